"""Video without captions, as batches of clips at drawn frame rates, whatever list they come from.

Make-A-Video learns motion from unlabeled video. That no caption can leave this module is not a promise
but a property: the captions are never kept, so there is nothing to leak.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from datamodules.clips import Curriculum, Keep, take_clip
from datamodules.filters import read_names
from datamodules.image_text import ImageTextDataModule
from datamodules.joint import Streams, Turns
from datamodules.pixels import check_sizes
from datamodules.shards import Batch, Batches, Mixture, Sample, Source, StreamDataModule
from datamodules.tars import Entry
from datamodules.video_sources import Clip, list_clips

EVERY = Keep()


class Schedule(NamedTuple):
    """Which training step a position belongs to: `step` began at position `consumed`."""

    step: int = 0
    consumed: int = 0
    samples_per_step: float = 1  # over all ranks

    def at(self, position: int) -> int:
        return self.step + int((position - self.consumed) // self.samples_per_step)


@dataclass(frozen=True)
class Clips:
    """Listed clips: {"video": uint8 (3, f, h, w), "fps": float32 (), "key": str}."""

    clips: list[Clip]
    frames: int
    resolution: int
    crop: int | None
    curriculum: Curriculum
    schedule: Schedule
    keep: Keep = EVERY
    rate: float | None = None  # frames per second for all clips, in place of the curriculum's

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def sizes(self) -> list[int]:
        """Samples of each shard; all that lies in no shard is one."""
        shards = (clip.file.shard if isinstance(clip.file, Entry) else "" for clip in self.clips)
        return [len(list(group)) for _, group in groupby(shards)]

    @property
    def pixels(self) -> tuple[int, ...]:
        return (3, self.frames, *[self.crop or self.resolution] * 2)

    def name(self, index: int) -> str:
        return self.clips[index].name

    def load(self, index: int, position: int, rng: np.random.Generator) -> Sample:
        clip = self.clips[index]
        f = self.rate or self.curriculum.draw(rng, self.schedule.at(position))
        video, spans = clip.open()
        pixels, fps = take_clip(video, f, self.frames, self.resolution, rng, self.crop, spans, self.keep)
        return {"video": pixels, "fps": torch.tensor(fps, dtype=torch.float32), "key": clip.key}


class VideoDataModule(StreamDataModule):
    """Batches {"video": uint8 (b, 3, f, h, w), "fps": float32 (b,), "key": list[str]}, endless.

    root: a folder of videos; a folder with a WebVid CSV (columns videoid, page_dir) and videos
    page_dir/videoid.mp4, or that CSV; tar shards of video2dataset (a .tar, a folder, a glob or a brace range of
    them); or an HD-VILA .jsonl with its videos beside it. `list_clips` tells them apart. Several are one set.
    batch_size: clips of one rank. frames: of a clip. resolution: the short side in pixels, before the
    centre square is cut; crop: side of a random crop of it, at one place for the whole clip.
    seed: of order, rates, starts and crops. workers: processes that decode. keep: which clips are dropped for
    standing still or for a cut. They count as skipped, so that max_skipped, as in `StreamDataModule`, must allow for
    them. window, changed: as there. only, without: paths of lists of keys, one a line: of the clips that alone are
    taken, and of those left out.
    images, image_share: joint training; this share of the batches, the same on all ranks, are pictures of that module's
    shards in place of clips, {"image": uint8 (b * frames, 3, h, w), "key": list[str]}, as many as a batch has frames.
    The clips are those there would be without them, in their order; a checkpoint counts the pictures by themselves.
    "fps" is the rate of the frames taken, not the one asked for. There is never text in a batch.
    Raises FileNotFoundError and ValueError as `list_clips` does.

    rates: how many clips of this rank came at each achieved rate, rounded to a frame per second. Counted as batches
    are handed to training, so that a callback can log it (one histogram a thousand steps, say); previews are not in
    it, and it begins anew with the process.
    """

    def __init__(
        self,
        root: str | Path | Sequence[str],
        batch_size: int,
        frames: int,
        resolution: int,
        crop: int | None = None,
        *,
        curriculum: Curriculum,
        seed: int = 0,
        workers: int = 0,
        keep: Keep = EVERY,
        max_skipped: float = 0.5,
        window: int = 0,
        changed: bool = False,
        images: ImageTextDataModule | None = None,
        image_share: float = 0.0,
        only: str = "",
        without: str = "",
    ) -> None:
        super().__init__(batch_size, seed, workers, max_skipped, window, changed)
        check_sizes(resolution, crop)
        if not 0 <= image_share < 1 or (images is None) != (image_share == 0):
            raise ValueError(f"The share of pictures is {image_share}; give 0 without pictures, or less than 1.")
        if images is not None and images.text:
            raise ValueError("A video stage has no place for captions: its pictures come without text.")
        if frames < 2:
            raise ValueError(f"A clip has frames = {frames}; give at least 2, one frame has no rate.")
        self.roots = [str(root)] if isinstance(root, str | Path) else list(root)
        self.frames, self.resolution, self.crop = frames, resolution, crop
        self.curriculum, self.keep = curriculum, keep
        self.only, self.without = (read_names(path) if path else None for path in (only, without))
        self.rates: Counter[int] = Counter()
        self._clips: list[Clip] = []
        self._schedule: Schedule | None = None
        self.images, self.image_share = images, image_share
        self._turns = Mixture(seed, [1 - image_share, image_share] if images else [1.0])
        self._first_picture = 0  # pictures trained on when counting began

    def setup(self, stage: str | None = None) -> None:
        """Reads the lists of clips, once, and counts what is damaged in them."""
        if self._clips:
            return
        for root in self.roots:
            clips, problems = list_clips(root)
            shards = {clip.file.shard for clip in clips if isinstance(clip.file, Entry)}
            self.note_opening(problems, shards, len(clips))
            self._clips += [clip for clip in clips if self.wanted(clip.key)]
        if not self._clips:
            raise ValueError("The lists data.clips_only and data.clips_without leave no clip.")
        if self.images:
            self.images.setup()
            self.skipped += self.images.skipped
            self._opening += self.images.skipped
            self._examples = {**self.images._examples, **self._examples}
            self.filtered += self.images.filtered

    def wanted(self, key: str) -> bool:
        """Do the lists leave this clip in?"""
        return (self.only is None or key in self.only) and (self.without is None or key not in self.without)

    @property
    def consumed(self) -> int:
        """Clips trained on so far, over all ranks."""
        if self.images is None:
            return super().consumed
        return self._start + self._turns_taken()[0] * self.batch_size * self.world

    @property
    def pictures(self) -> int:
        """Pictures trained on so far, over all ranks."""
        return self._first_picture + self._turns_taken()[1] * self.batch_size * self.frames * self.world

    def _turns_taken(self) -> list[int]:
        """Batches of clips and of pictures since counting began."""
        if self._progress is None:
            return [0, 0]
        now = self._turns.before(self._progress.total.processed)
        return (now - self._turns.before(self._processed)).tolist()

    def train_dataloader(self) -> Batches:
        self._schedule = self.schedule
        if self.trainer and self.images:
            self._first_picture = self.pictures
        return super().train_dataloader()

    def check_order(self, sources: Sequence[Source]) -> None:
        super().check_order([*sources, *(self.images.sources() if self.images else [])])

    def dataset(self) -> Dataset[Sample]:
        clips = super().dataset()
        return clips if self.images is None else Streams(clips, self.images.dataset())

    def batches(self, rank: int) -> Sampler[list[Any]]:
        if self.images is None:
            return super().batches(rank)

        def start() -> tuple[int, Sequence[int]]:
            return self._progress.total.processed if self._progress else 0, (self.consumed, self.pictures)

        return Turns(self._turns, start, (self.batch_size, self.batch_size * self.frames), rank, self.world)

    def state_dict(self) -> dict[str, Any]:
        pictures = {"pictures": self.pictures} if self.images else {}
        return {**super().state_dict(), "schedule": list(self.schedule), **pictures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._schedule = Schedule(*state_dict["schedule"]) if "schedule" in state_dict else None
        self._first_picture = int(state_dict.get("pictures", 0))

    def source(self) -> Clips:
        self.setup()
        return Clips(
            self._clips,
            self.frames,
            self.resolution,
            self.crop,
            self.curriculum,
            self.schedule,
            self.keep,
        )

    @property
    def schedule(self) -> Schedule:
        """As in the checkpoint while a step has as many samples; else that of the step where training stands, begun
        here: the curriculum goes on, and does not jump, on another number of ranks or with another batch."""
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        # The curriculum goes by training steps, of which those with pictures take no clips.
        samples_per_step = self.batch_size * self.world * accumulate * (1 - self.image_share)
        before = self._schedule or Schedule(samples_per_step=samples_per_step)
        if before.samples_per_step == samples_per_step:
            return before
        return Schedule(before.at(self.consumed), self.consumed, samples_per_step)

    def preview_source(self) -> Clips:
        """All clips at the mean rate that the curriculum ends with."""
        return replace(self.source(), rate=self.curriculum.mean(self.curriculum.steps))

    def preview(self, n: int) -> Batch:
        rates = self.rates.copy()
        batch = super().preview(n)
        self.rates = rates
        return batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Takes the failures out of the batch and counts them and the rates; raises as the base class does."""
        if isinstance(batch, dict) and "fps" in batch:
            self.rates.update(round(fps) for fps in batch["fps"].tolist())
        return super().on_before_batch_transfer(batch, dataloader_idx)

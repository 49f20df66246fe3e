"""Clips to be scored: each once, in a fixed order, cut alike on every run.

Training draws endless clips from a stream; a score is of so many and no others, so nothing takes the place of one that
cannot be read: it is left out and counted.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.clips import take_clip
from datamodules.pixels import square
from datamodules.shards import AHEAD, TIMEOUT, Batch, Sample, describe
from datamodules.video_sources import Clip

CUT = "centre square, bicubic antialiased"


@dataclass(frozen=True)
class Shown(Dataset[Sample]):
    """The clips of one kind as {"video": uint8 (3, frames, side, side), "fps": float, "number": int, "size": (h, w)}.

    A clip that cannot be read, or is too short, is {"failure": (name, cause)}. "size" is that of the file's frames.
    """

    clips: Sequence[Clip]
    frames: int
    side: int  # 0 = the short side of each clip
    rate: float = 0.0  # frames a second, from a start drawn from (seed, number); 0 = the first frames, as they are
    seed: int = 0

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> Sample:
        clip = self.clips[number]
        try:
            video, spans = clip.open()
            if self.rate:
                rng = np.random.default_rng((self.seed, number))
                side = self.side or 1
                pixels, fps = take_clip(video, self.rate, self.frames, side, rng, spans=spans)
                return {"video": pixels, "fps": fps, "number": number, "size": (side, side)}
            if len(video.times) < self.frames:
                raise ValueError(f"the clip is too short for {self.frames} frames")
            shown = video.frames(np.arange(self.frames))
            fps = (self.frames - 1) / float(video.times[self.frames - 1])
            size = shown.shape[1:3]
            pixels = square(shown, self.side or min(size)).transpose(0, 1)
            return {"video": pixels, "fps": fps, "number": number, "size": size}
        except Exception as error:  # whatever a decoder raises; it is counted and told
            return {"failure": (self.name(number), describe(error))}

    def name(self, number: int) -> str:
        """A clip's file, or its place in a shard, for messages."""
        clip = self.clips[number]
        return clip.file if isinstance(clip.file, str) else clip.name


class Both(Dataset[Sample]):
    """Several kinds of clips as one set of (kind, number), so that the workers go on from one kind to the next."""

    def __init__(self, kinds: Sequence[Shown]):
        self.kinds = kinds

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        kind, number = place
        return self.kinds[kind][number] | {"kind": kind}


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples of one kind and size to a batch; of several sizes the videos stay a list."""
    good = [sample for sample in samples if "video" in sample]
    batch: Batch = {name: [sample[name] for sample in good] for name in ("video", "fps", "number", "size")}
    batch["kind"] = samples[0]["kind"]
    batch["failures"] = [sample["failure"] for sample in samples if "failure" in sample]
    if good and len({sample["video"].shape for sample in good}) == 1:
        batch["video"] = torch.stack([sample["video"] for sample in good])
    return batch


class Scored:
    """Batches of all kinds of clips, once, one kind after the other, with what is to be reported of them.

    skipped: failures by cause, of each kind. rates: the sum and the number of the frame rates of each kind.
    waiting: seconds that the caller waited for a batch, or for the processes that read to start.
    sizes: those of the files' frames, (height, width), of kinds that are shown as they are.
    Raises ValueError where the files of the first kind have frames of several sizes and `side` does not make them one.
    """

    def __init__(self, kinds: Sequence[Shown], batch_size: int, workers: int):
        self.kinds = kinds
        places = [
            [(kind, number) for number in range(start, min(start + batch_size, len(shown)))]
            for kind, shown in enumerate(kinds)
            for start in range(0, len(shown), batch_size)
        ]
        self.loader: DataLoader[Sample] = DataLoader(
            Both(kinds),
            batch_sampler=places,
            collate_fn=collate,
            num_workers=min(workers, len(places)),
            prefetch_factor=AHEAD if workers and places else None,
            timeout=TIMEOUT if workers and places else 0,
            pin_memory=torch.cuda.is_available(),
        )
        self.skipped = [Counter[str]() for _ in kinds]
        self.examples: dict[str, str] = {}
        self.counts = [0 for _ in kinds]
        self.fps = [0.0 for _ in kinds]  # sums
        self.sizes: set[tuple[int, int]] = set()
        self.size: tuple[int, int] | None = None
        start = time.perf_counter()
        self.batches = iter(self.loader)
        self.waiting = time.perf_counter() - start

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        start = time.perf_counter()
        while True:
            batch = next(self.batches, None)
            self.waiting += time.perf_counter() - start
            if batch is None:
                return
            self.note(batch)
            if batch["number"]:
                yield batch
            start = time.perf_counter()

    def note(self, batch: Batch) -> None:
        """Counts a batch."""
        kind = batch["kind"]
        for name, cause in batch["failures"]:
            self.skipped[kind][cause] += 1
            self.examples.setdefault(cause, name)
        self.counts[kind] += len(batch["number"])
        self.fps[kind] += sum(batch["fps"])
        for number, size in zip(batch["number"], batch["size"], strict=True):
            if self.kinds[kind].rate:
                continue
            self.sizes.add(tuple(size))
            if self.kinds[kind].side:
                continue
            self.size = self.size or tuple(size)
            if tuple(size) != self.size:
                raise ValueError(
                    f"{self.kinds[kind].name(number)} has frames of {size[1]}x{size[0]} pixels, those before it "
                    f"of {self.size[1]}x{self.size[0]}; evaluate.resolution=N makes all N x N."
                )

    def mean_rate(self, kind: int) -> float:
        """Frames a second of the clips of a kind."""
        return self.fps[kind] / max(1, self.counts[kind])

    def worst(self, kind: int) -> str:
        """The most common causes of failure of a kind, each with an example."""
        causes = self.skipped[kind].most_common(3)
        return "; ".join(f"{n} times: {cause} (as {self.examples[cause]})" for cause, n in causes)


def look(clips: Sequence[Clip], frames: int) -> tuple[int, float]:
    """The short side and the frame rate of the first clip that can be read. Raises ValueError where none can."""
    shown, cause = Shown(clips, frames, 0), ""
    for number in range(len(clips)):
        sample = shown[number]
        if "video" in sample:
            return sample["video"].shape[-1], sample["fps"]
        cause = cause or f"{sample['failure'][0]}: {sample['failure'][1]}"
    raise ValueError(f"none of the {len(clips)} clips can be read ({cause or 'there are none'}).")

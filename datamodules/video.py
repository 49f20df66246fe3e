"""Video without captions: clips listed in a WebVid CSV, of which only the file names are read.

Make-A-Video learns motion from unlabeled video. That no caption can leave this module is not a promise
but a property: the captions are never kept, so there is nothing to leak.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from datamodules.clips import Curriculum, read_clip
from datamodules.pixels import check_sizes
from datamodules.shards import Sample, StreamDataModule

COLUMNS = ("videoid", "page_dir")  # all that is read; `name` holds the caption


def list_clips(root: Path) -> list[tuple[str, str]]:
    """(videoid, page_dir) of each row of the one CSV file in `root`, in its order.

    Raises FileNotFoundError without a CSV, ValueError for several, missing columns, or no row with a video.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {root}; give the one that holds the CSV and the videos.")
    tables = sorted(root.glob("*.csv"))
    if not tables:
        raise FileNotFoundError(f"There is no CSV file in {root}; give the folder that holds one.")
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise ValueError(f"There are several CSV files in {root} ({names}); leave the one to train on.")
    table = tables[0]
    clips = []
    try:
        # Captions may be in any encoding: they are not read, so they need not be right.
        with table.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = csv.reader(file)
            header = next(rows, [])
            missing = [column for column in COLUMNS if column not in header]
            if missing:
                raise ValueError(f"{table} lacks the column {' and '.join(missing)}; WebVid's CSV has both.")
            columns = [header.index(column) for column in COLUMNS]
            for row in rows:
                if len(row) > max(columns) and row[columns[0]]:
                    clips.append((row[columns[0]], row[columns[1]]))
    except csv.Error as error:
        raise ValueError(f"{table} is not a CSV file ({error}); write it anew.") from None
    if not any((root / page / f"{video}.mp4").exists() for video, page in clips):
        raise ValueError(f"No video listed in {table} is there; expected is page_dir/videoid.mp4 in {root}.")
    return clips


@dataclass(frozen=True)
class Clips:
    """The clips of a folder: {"video": uint8 (3, f, h, w), "fps": float32 (), "key": str}."""

    root: Path
    clips: list[tuple[str, str]]  # (videoid, page_dir)
    frames: int
    resolution: int
    crop: int | None
    curriculum: Curriculum
    samples_per_step: int  # over all ranks: turns a position into a training step
    rate: float | None = None  # frames per second for all clips, in place of the curriculum's

    def __len__(self) -> int:
        return len(self.clips)

    def path(self, index: int) -> Path:
        video, page = self.clips[index]
        return self.root / page / f"{video}.mp4"

    def name(self, index: int) -> str:
        return f"{self.path(index)}:{self.clips[index][0]}"

    def load(self, index: int, position: int, rng: np.random.Generator) -> Sample:
        f = self.rate or self.curriculum.draw(rng, position // self.samples_per_step)
        video, fps = read_clip(self.path(index), f, self.frames, self.resolution, rng, self.crop)
        return {"video": video, "fps": torch.tensor(fps, dtype=torch.float32), "key": self.clips[index][0]}


class VideoDataModule(StreamDataModule):
    """Batches {"video": uint8 (b, 3, f, h, w), "fps": float32 (b,), "key": list[str]}, endless.

    root: the folder of a WebVid CSV (columns videoid, page_dir) and videos page_dir/videoid.mp4.
    batch_size: clips of one rank. frames: of a clip. resolution: the short side in pixels, before the
    centre square is cut; crop: side of a random crop of it, at one place for the whole clip.
    seed: of order, rates, starts and crops. workers: processes that decode.
    "fps" is the rate of the frames taken, not the one asked for. There is never text in a batch.
    Raises FileNotFoundError and ValueError as `list_clips` does.
    """

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        frames: int,
        resolution: int,
        crop: int | None = None,
        *,
        curriculum: Curriculum,
        seed: int = 0,
        workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, workers)
        check_sizes(resolution, crop)
        if frames < 2:
            raise ValueError(f"A clip has frames = {frames}; give at least 2, one frame has no rate.")
        self.root, self.frames, self.resolution, self.crop = Path(root), frames, resolution, crop
        self.curriculum = curriculum
        self._clips: list[tuple[str, str]] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Reads the list of clips, once."""
        if self._clips is None:
            self._clips = list_clips(self.root)

    def source(self) -> Clips:
        self.setup()
        assert self._clips is not None
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        samples_per_step = self.batch_size * self.world * accumulate
        return Clips(
            self.root,
            self._clips,
            self.frames,
            self.resolution,
            self.crop,
            self.curriculum,
            samples_per_step,
        )

    def preview_source(self) -> Clips:
        """All clips at the mean rate that the curriculum ends with."""
        return replace(self.source(), rate=self.curriculum.mean(self.curriculum.steps))

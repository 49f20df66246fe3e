"""A small FVD and CLIPSIM while D and D^t train: of pictures and clips at fixed prompts and seeds."""

from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from lightning_modules.callbacks import EMA, Samples
from lightning_modules.media import as_bytes
from lightning_modules.metrics.clipsim import CLIPSIM, ImageTextEncoder
from lightning_modules.metrics.fvd import FrechetVideoDistance


class Validation(Samples):
    """Pictures of a fixed batch, as `Samples` makes them, with the scores of what was made.

    Few clips and early weights: a curve to compare with itself, not with what is published. FVD is of `made` against
    `real`, CLIPSIM of `made` against the prompts.

    Args:
        batch: real clips or pictures, and under "image_embedding" what P made of the prompts, if there are any.
        where: stands before the names of the scores, `validation/clipsim`: which real clips these are.
        prompts: of each sample, none = no CLIPSIM.
        fvd: the distance, None = none, as for pictures.
    """

    image, video = "prompted", "prompted_clips"

    def __init__(
        self,
        batch: dict[str, Any],
        folder: Path,
        every: int,
        ema: EMA,
        seed: int,
        where: str,
        clip: ImageTextEncoder,
        prompts: list[str],
        fvd: FrechetVideoDistance | None,
    ):
        super().__init__(batch, folder, every, ema, seed)
        self.where, self.prompts, self.fvd = where, prompts, fvd
        self.clipsim = CLIPSIM(clip)
        for metric in (self.clipsim, *([fvd] if fvd is not None else [])):
            metric.sync_on_compute = metric._to_sync = False  # rank 0 alone scores; it would wait for the others

    def save(self, trainer: L.Trainer, pictures: dict[str, Tensor], step: int) -> None:
        super().save(trainer, pictures, step)
        real, made = (as_clips(pictures[kind]) for kind in ("real", "made"))
        scores = {}
        if self.prompts:
            self.clipsim.reset()
            self.clipsim.to(made.device)
            self.clipsim.update(made, self.prompts)
            scores["clipsim"] = float(self.clipsim.compute())
        if self.fvd is not None:
            self.fvd.reset()
            self.fvd.to(made.device)
            self.fvd.update(real, real=True)
            self.fvd.update(made, real=False)
            scores[self.fvd.name] = float(self.fvd.compute())
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.where}/{name}": value for name, value in scores.items()}, step)


def as_clips(pictures: Tensor) -> Tensor:
    """[-1, 1] `b 3 h w` or `b 3 f h w` to uint8 `b 3 f h w`."""
    clips = pictures.unsqueeze(2) if pictures.ndim == 4 else pictures
    return as_bytes(clips)

"""Measures of generated video, each a torchmetrics.Metric that knows the name it may be reported under."""

from lightning_modules.metrics.clipsim import CLIPSIM
from lightning_modules.metrics.fvd import FrechetVideoDistance, frechet_distance

__all__ = ["CLIPSIM", "FrechetVideoDistance", "frechet_distance"]

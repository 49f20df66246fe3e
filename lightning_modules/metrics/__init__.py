"""Measures of generated video, each a torchmetrics.Metric that knows the name it may be reported under."""

from lightning_modules.metrics.clipsim import CLIPSIM
from lightning_modules.metrics.distances import frechet_distance, kernel_distance
from lightning_modules.metrics.fid import CLIPFrechetDistance, FrechetInceptionDistance
from lightning_modules.metrics.fvd import FrechetVideoDistance
from lightning_modules.metrics.inception_score import VideoInceptionScore
from lightning_modules.metrics.kvd import KernelVideoDistance

__all__ = [
    "CLIPSIM",
    "CLIPFrechetDistance",
    "FrechetInceptionDistance",
    "FrechetVideoDistance",
    "KernelVideoDistance",
    "VideoInceptionScore",
    "frechet_distance",
    "kernel_distance",
]

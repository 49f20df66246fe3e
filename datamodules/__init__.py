"""Data modules know files. They import torch, lightning, numpy, PIL and decord, and nothing else of ours."""

from datamodules.clips import Curriculum
from datamodules.image_text import ImageTextDataModule
from datamodules.video import VideoDataModule

__all__ = ["Curriculum", "ImageTextDataModule", "VideoDataModule"]

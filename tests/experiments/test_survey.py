"""`make inspect` on the demo's own data, and on what is not there."""

from pathlib import Path

import pytest
from PIL import Image

from datamodules.filters import FilterConfig
from experiments.survey import inspect

DEMO = Path(__file__).parents[2] / "experiments" / "demo"


def test_images(tmp_path: Path) -> None:
    text = inspect(str(DEMO / "pairs"), FilterConfig(min_side=300), tmp_path / "sheet.png", samples=40)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "samples 128" in lines and "opened, evenly spread 40" in lines
    assert any(line.startswith("width, px 256 256 256 256 256") for line in lines)
    assert any(line.startswith("min_side < 300 40 100.0%") for line in lines)
    assert Image.open(tmp_path / "sheet.png").width == 12 * 96


def test_videos(tmp_path: Path) -> None:
    text = inspect(str(DEMO / "clips"), FilterConfig(), tmp_path / "sheet.png", samples=12)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "samples 96" in lines and any(line.startswith("frames per second 24 24 24 24 24") for line in lines)
    assert Image.open(tmp_path / "sheet.png").size == (12 * 96, 96)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        inspect(str(tmp_path / "nowhere"), FilterConfig(), tmp_path / "sheet.png")

"""The pictures of what a size has learnt: each is made of what its name says."""

import csv
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import build, showcase
from experiments.compare import NEVER_MOVED
from experiments.config import Config, load


@pytest.fixture
def told(page: Path, tmp_path: Path) -> list[str]:
    """Arguments: two clips held out, of one of which the still is held out too."""
    with (Path(load(str(page)).data.clips) / "clips.csv").open() as file:
        keys = [row["videoid"] for row in csv.DictReader(file)][:4]
    for name, some in (("only", keys), ("clips", keys[:3]), ("stills", keys[:1])):
        (tmp_path / f"{name}.txt").write_text("".join(f"{key}\n" for key in some))
    return [f"data.clips_only={tmp_path}/only.txt", f"data.clips_without={tmp_path}/clips.txt",
            f"data.filters.without.hexcode={tmp_path}/stills.txt", f"runs={tmp_path / 'runs'}",
            "generate.size_out=16", "cascade.frames=3"]  # fmt: skip


@pytest.fixture
def config(page: Path, told: list[str]) -> Config:
    return load(str(page), told)


def test_stills_are_those_whose_motion_was_never_seen(config: Config, told: list[str]) -> None:
    stills = showcase.stills(config)
    assert stills.shape == (2, 3, 16, 16) and stills.dtype == torch.uint8
    every = build.stills(config, config.decoder, 16, None).preview(128)
    known = {tuple(image.flatten().tolist()): key for key, image in zip(every["key"], every["image"], strict=True)}
    shown = {known[tuple(image.flatten().tolist())] for image in stills}
    found = set()
    for shard in sorted(Path(config.data.shards[0]).parent.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for name in tar.getnames():
                if name.endswith(".json") and Path(name).stem in shown:
                    found.add(json.loads(tar.extractfile(name).read())["hexcode"])  # type: ignore[union-attr]
    assert found == set(Path(config.data.clips_without).read_text().split()[1:])


def test_rows_of_training_are_in_its_order(config: Config, tmp_path: Path) -> None:
    samples = build.run_folder(config, "decoder") / "samples"
    showcase.training(config, tmp_path)  # without pictures there is none, and no error
    assert not (tmp_path / "training.png").exists()
    samples.mkdir(parents=True)
    for step in range(1, 13):
        grid = np.full((32, 64, 3), 10 * step, dtype=np.uint8)
        grid[:16] = 255  # the stills
        Image.fromarray(grid).save(samples / f"step_{step * 100:08d}.png")
    showcase.training(config, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "training.png"))
    values = sheet[8::16, -1, 0].tolist()
    assert values[0] == 255 and values[1] == 10 and values[-1] == 120
    assert values[1:] == sorted(set(values[1:])) and len(values) <= 1 + showcase.ROWS


def test_the_command(page: Path, told: list[str], config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in build.film_stages(config).values():  # the weights are the page's, the run folder another
        own = build.run_folder(config, stage)
        own.parent.mkdir(parents=True, exist_ok=True)
        own.symlink_to(build.run_folder(load(str(page)), stage))
    showcase.main([str(page), *told])
    assert "films of 2 sentences, 2 stills set in motion" in capsys.readouterr().out
    folder = build.run_folder(config, "showcase")
    with Image.open(folder / "animated.webp") as gif, Image.open(folder / "animated.png") as sheet:
        assert gif.size == (2 * showcase.SIDE, 2 * showcase.SIDE) and gif.n_frames == 11
        assert sheet.size == ((showcase.COLUMNS + 2) * showcase.SIDE, 2 * showcase.SIDE)
        first = np.asarray(sheet, dtype=float)[: showcase.SIDE]
        assert np.abs(first[:, : showcase.SIDE] - first[:, showcase.SIDE : 2 * showcase.SIDE]).mean() < 12
    with Image.open(folder / "films.webp") as gif:
        assert gif.size == (2 * showcase.SIDE, showcase.SIDE)
    kind, names = (folder / "films.txt").read_text().strip().split(": ")
    assert kind == NEVER_MOVED and len(names.split(", ")) == 2

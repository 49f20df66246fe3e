"""Embeddings computed once: resumable, and the same training from them as from the pictures."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from datamodules import embeddings
from datamodules.tars import expand
from experiments import build
from experiments.config import Config, save
from experiments.prepare import embed, index, share
from experiments.train import train


@pytest.fixture
def config(trained: Config, tmp_path: Path) -> Config:
    """The trained micro cascade's CLIP, on shards of one's own."""
    for shard in expand(trained.data.shards):
        shutil.copy(shard, tmp_path)
    shutil.copytree(build.run_folder(trained, "clip"), tmp_path / "runs" / trained.size / "clip")
    data = replace(trained.data, shards=[str(tmp_path)], embeddings=True)
    return replace(trained, runs=str(tmp_path / "runs"), data=data)


def test_an_interrupted_embed_goes_on(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="make embed"):
        build.datamodule(config, "prior", build.load_clip(config)).preview(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert embed(config) == {"shards": 1, "samples": 64}
    monkeypatch.setenv("RANK", "1")
    assert not embed(config)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
    assert embed(config) == {"shards": 1, "samples": 64, "shards left without": 1}
    assert embed(config) == {"shards left without": 1}


def test_a_killed_embed_goes_on(config: Config, tmp_path: Path) -> None:
    """A real process, killed with SIGKILL between its first shard and its last."""
    shards = [tmp_path / "many" / f"{i:02d}.tar" for i in range(24)]
    shards[0].parent.mkdir()
    for shard in shards:
        shutil.copy(expand(config.data.shards)[0], shard)
    config = replace(config, data=replace(config.data, shards=[str(shards[0].parent)]))
    save(config, page := tmp_path / f"{config.size}.yaml")
    command = [sys.executable, "-m", "experiments.prepare", "embed", str(page)]
    with (tmp_path / "errors.txt").open("w") as errors, subprocess.Popen(command, stdout=errors, stderr=errors) as run:
        while len(list(shards[0].parent.glob("*.safetensors"))) < 2:
            assert run.poll() is None, (tmp_path / "errors.txt").read_text()[-2000:]
            time.sleep(0.002)
        run.kill()
    left = len(embeddings.missing(list(map(str, shards)), build.load_clip(config).name))
    assert 0 < left <= 22, "the run was over before it could be killed"
    assert embed(config) == {"shards": left, "samples": 64 * left}
    files = sorted(shards[0].parent.glob("*.safetensors"))
    assert len(files) == 24
    for found in map(load_file, files):  # the shards are the same
        for name, right in load_file(files[-1]).items():
            assert right.any(1).all()
            torch.testing.assert_close(found[name], right, atol=2e-3, rtol=0)  # float16, and another process
    assert len(list(shards[0].parent.iterdir())) == 48  # and nothing half written


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_each_process_has_its_share(config: Config, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str]) -> None:
    parts = []
    for rank in range(2):
        monkeypatch.setenv(names[0], str(rank))
        monkeypatch.setenv(names[1], "2")
        parts += share(config)
    assert sorted(parts) == sorted(expand(config.data.shards)) and len(parts) == 2


def test_the_index_is_kept_once(config: Config) -> None:
    assert index(config) == {"shards": 2, "samples": 128}
    assert not index(config)


def test_a_disk_that_fails_does_not_become_a_row_of_zeros(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> bytes:
        raise OSError("input/output error")

    monkeypatch.setattr("datamodules.tars.Entry.read", fails)
    with pytest.raises(OSError, match="input/output"):
        embed(config)
    assert embeddings.missing(expand(config.data.shards), build.load_clip(config).name) == expand(config.data.shards)


def test_training_from_embeddings_is_training_from_pictures(config: Config) -> None:
    embed(config)
    clip = build.load_clip(config)
    for stage in ("prior", "decoder"):
        losses = []
        for on in (True, False):
            data = build.datamodule(replace(config, data=replace(config.data, embeddings=on)), stage, clip)
            torch.manual_seed(0)
            module = build.module(config, stage, build.network(config, stage), clip)
            batch = data.preview(8)
            assert ("image_embedding" in batch) == on and ("image" in batch) == (not on or stage == "decoder")
            torch.manual_seed(0)
            losses.append(float(module.loss(batch)))
        assert losses[0] == pytest.approx(losses[1], rel=2e-3)  # float16 in the file
        result = train(config, stage)
        assert result["steps"] == 4 and not result["skipped"]


def test_another_clip_has_other_embeddings(config: Config) -> None:
    embed(config)
    name = build.load_clip(config).name
    other = build.run_folder(config, "clip") / "weights.safetensors"
    data = bytearray(other.read_bytes())
    data[-1] ^= 1
    other.write_bytes(bytes(data))
    clip = build.load_clip(config)
    assert clip.name != name
    with pytest.raises(FileNotFoundError, match=f"no embeddings by {clip.name}"):
        build.datamodule(config, "prior", clip).preview(1)

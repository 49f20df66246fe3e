"""Samples of a benchmark as files: lossless, each with its own seed, gone on with after a kill, of one make only."""

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from datamodules.clips import open_video
from experiments import build, sampling
from experiments.config import Config
from experiments.sampling import OUTPUTS, clips_of, generate, missing, name, read_manifest, sample_seed, write_lossless
from tests.conftest import free_port
from tests.experiments.conftest import become_rank, micro

PROMPTS = [f"a bear, the {k}th" for k in range(7)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A micro cascade of weights that nobody trained."""
    config = micro(tmp_path_factory.mktemp("made"))
    for stage in build.wanted(config):
        torch.manual_seed(1)
        state = build.network(config, stage).state_dict()
        state = {k: v + 0.02 * torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}
        path = build.run_folder(config, stage) / "weights.safetensors"
        path.parent.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    return config


@pytest.fixture(scope="module")
def whole(made: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples, made by one process in one go."""
    folder = tmp_path_factory.mktemp("whole")
    generate(made, "decoded", PROMPTS, folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pixels(folder: Path, k: int) -> np.ndarray:
    video = open_video(folder / name(k))
    return video.frames(np.arange(len(video.times)))


@pytest.mark.parametrize("side", [16, 33])
def test_every_byte_comes_back(tmp_path: Path, side: int) -> None:
    clip = torch.randint(0, 256, (3, 16, side, side + 2), dtype=torch.uint8)
    write_lossless(tmp_path / "a.mp4", clip, 6.0)
    video = open_video(tmp_path / "a.mp4")
    assert np.array_equal(video.frames(np.arange(16)), clip.permute(1, 2, 3, 0).numpy())
    assert video.times[-1] == pytest.approx(15 / 6) and [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_each_sample_has_its_own_seed_and_no_neighbours(made: Config, whole: Path) -> None:
    """Sample 5 alone, with its seed, is the one that was made in a batch; another seed makes another."""
    maker = sampling.make_cascade(made)
    maker.on_step = None
    for k, seed, same in ((5, sample_seed(0, 5), True), (5, sample_seed(0, 6), False)):
        alone = clips_of(made, maker, "decoded", [PROMPTS[k]], [seed])[0].permute(1, 2, 3, 0).cpu().numpy()
        gap = np.abs(alone.astype(int) - pixels(whole, k)).max()
        assert (gap <= 1) == same  # a batch of another size rounds otherwise
    assert len(contents(whole)) == 8 and len({data for data in contents(whole).values()}) == 8
    manifest = read_manifest(whole)
    assert manifest["prompts"] == PROMPTS and manifest["fps"] == made.cascade.fps


def test_runs_of_two_seeds_have_no_noise_in_common() -> None:
    """With `seed + k`, all but one of them would be the same. The first is frozen: another makes other samples."""
    seeds = [sample_seed(seed, k) for seed in range(3) for k in range(2000)]
    assert len(set(seeds)) == 6000 and all(0 <= seed < 2**48 for seed in seeds)
    assert sample_seed(0, 0) == 240985647329524


def test_a_pretrained_clip_by_path_is_told_by_its_bytes(made: Config, tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    model = replace(made.clip.model, name="ViT-B-32", pretrained=str(path))
    config = replace(made, clip=replace(made.clip, model=model))
    found = set()
    for data in (b"one", b"two"):
        path.write_bytes(data)
        found.add(sampling.made_of(config, "decoded")["clip"])
    assert len(found) == 2


@pytest.mark.parametrize(("output", "side"), [("upsampled", 32), ("interpolated", 16), ("high", 64)])
def test_as_far_through_the_cascade_as_asked(made: Config, output: str, side: int) -> None:
    made = replace(made, cascade=replace(made.cascade, frames=4))
    maker = sampling.make_cascade(made)
    maker.on_step = None
    clip = clips_of(made, maker, output, PROMPTS[:1], [0])
    assert clip.shape == (1, 3, 4, side, side) and clip.dtype == torch.uint8
    assert sampling.rate(made, output) == made.cascade.fps * (1 if output == "upsampled" else made.cascade.skip)
    assert set(sampling.made_of(made, output)) >= set(OUTPUTS[output])


def test_what_exists_is_skipped_and_what_is_missing_made_again_to_the_byte(
    made: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "samples"
    shutil.copytree(whole, folder)
    (folder / name(3)).unlink()
    (folder / name(6)).unlink()
    (folder / (name(6) + ".part")).write_bytes(b"half")
    assert missing(folder, 7, 2) == [[2, 3], [6]]
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
    generate(made, "decoded", PROMPTS, folder)
    assert contents(folder) == contents(whole)
    assert {n: (folder / n).stat().st_mtime_ns for n in before} == before
    monkeypatch.setattr(sampling, "make_cascade", lambda config: pytest.fail("all is there"))
    generate(made, "decoded", PROMPTS, folder)
    generate(made, "decoded", PROMPTS[:3], folder)  # fewer are the beginning of them, which forgets none
    assert read_manifest(folder)["prompts"] == PROMPTS


def rank(number: int, world: int, port: int, config: Config, folder: Path, killed_at: int, by: int) -> None:
    """A process as torchrun starts it; one with `killed_at` dies in the middle of writing that sample."""
    if world > 1:
        become_rank(number, world, port)
    written = [0]

    def dying(frame: np.ndarray) -> np.ndarray:
        written[0] += 1
        if written[0] == 16 * killed_at + 15:
            os.kill(os.getpid(), by)
        return np.ascontiguousarray(frame)

    if killed_at:
        sampling.np = SimpleNamespace(ascontiguousarray=dying, random=np.random, uint64=np.uint64)  # type: ignore[assignment]
    settings = replace(config.evaluate, devices=str(world), accelerator="cpu")
    generate(replace(config, evaluate=settings), "decoded", PROMPTS, folder)


def start(
    config: Config, folder: Path, world: int = 1, killed_at: int = 0, by: int = signal.SIGKILL
) -> list[int | None]:
    """Run `rank` in processes of its own; their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.sampling"])
    port = free_port()
    arguments = [(number, world, port, config, folder, killed_at, by) for number in range(world)]
    processes = [context.Process(target=rank, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes]


def test_two_processes_make_the_files_of_one(made: Config, whole: Path, tmp_path: Path) -> None:
    assert start(made, tmp_path / "two", world=2) == [0, 0]
    assert contents(tmp_path / "two") == contents(whole)
    (tmp_path / "two" / name(4)).unlink()
    assert start(made, tmp_path / "two", world=2) == [0, 0]  # of which one has nothing left to do
    assert contents(tmp_path / "two") == contents(whole)


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM])
def test_killed_while_it_writes_and_run_again_there_are_the_files_of_one_run(
    made: Config, whole: Path, tmp_path: Path, by: int
) -> None:
    assert start(made, tmp_path / "killed", killed_at=3, by=by) == [-by]
    left = [path.name for path in sorted((tmp_path / "killed").iterdir())]
    assert left == [*(name(k) for k in range(3)), name(3) + ".part", "manifest.json"]
    assert start(made, tmp_path / "killed") == [0]
    assert contents(tmp_path / "killed") == contents(whole)


def test_samples_of_another_make_are_refused_by_name(made: Config, whole: Path, tmp_path: Path) -> None:
    def refused(config: Config, *parts: str, output: str = "decoded") -> None:
        with pytest.raises(ValueError, match="holds samples made with another") as error:
            generate(config, output, PROMPTS, whole)
        found = str(error.value).split("another ")[1].split("; remove that folder")[0]
        assert found.split(", ") == list(parts)

    before = contents(whole)
    refused(replace(made, seed=1), "seed")
    steps = replace(made.cascade.decoder, steps=3)
    refused(replace(made, cascade=replace(made.cascade, decoder=steps)), "cascade.decoder")
    refused(replace(made, evaluate=replace(made.evaluate, fps=9.0)), "frame rate")
    retrained = replace(made, runs=str(tmp_path))
    shutil.copytree(made.runs, tmp_path, dirs_exist_ok=True)
    path = build.run_folder(retrained, "decoder_video") / "weights.safetensors"
    save_file({k: v * 2 if v.is_floating_point() else v for k, v in load_file(path).items()}, path)
    refused(retrained, "decoder_video")
    refused(made, "sr_low", "network of sr_low", "cascade.sr_low", "evaluate.output", output="upsampled")
    with pytest.raises(ValueError, match=r"sample 1 is of 'a bear, the 1th', not of 'a ram'\); remove that folder"):
        generate(made, "decoded", [PROMPTS[0], "a ram"], whole)
    assert contents(whole) == before
    generate(replace(made, evaluate=replace(made.evaluate, batch_size=3)), "decoded", PROMPTS, whole)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / name(0)).write_bytes(b"")
    with pytest.raises(ValueError, match="holds clips and no manifest.json"):
        generate(made, "decoded", PROMPTS, tmp_path / "foreign")
    (tmp_path / "foreign" / "manifest.json").write_text(json.dumps({"prompts": []}))
    with pytest.raises(ValueError, match=r"manifest.json is damaged: remove the folder"):
        generate(made, "decoded", PROMPTS, tmp_path / "foreign")


def test_samples_of_a_cascade_that_is_not_trained_name_the_command(fresh: Config, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make train-clip SIZE="):
        generate(fresh, "decoded", PROMPTS, tmp_path / "samples")
    assert not (tmp_path / "samples").exists()

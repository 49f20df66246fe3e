"""Two processes train as one: losses, weights and average under DDP and FSDP2, and from one to the other."""

import csv
import multiprocessing
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, partialmethod
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from experiments import build
from experiments.config import Config
from experiments.train import quiet, train
from tests.conftest import free_port
from tests.experiments.conftest import become_rank


def rank(number: int, port: int, jobs: Connection) -> None:
    """A process as torchrun starts it, which trains what it is sent."""
    become_rank(number, 2, port)
    quiet()
    # inductor takes minutes for what this shows: that networks which are split and recomputed can be traced
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="aot_eager")  # type: ignore[method-assign]
    while job := jobs.recv():
        try:
            result = train(*job)
            jobs.send({**result, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]})
        except BaseException:
            jobs.send(traceback.format_exc())


class Pair:
    """Two processes that wait for work."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["experiments.train"])
        port = free_port()
        self.pipes, self.processes = [], []
        for number in range(2):
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=rank, args=(number, port, theirs), daemon=True))
            self.processes[-1].start()
            theirs.close()
            self.pipes.append(ours)

    def do(self, config: Config, stage: str) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((config, stage))
        return [pipe.recv() if pipe.poll(100) else "a process hangs" for pipe in self.pipes]

    def end(self) -> list[int | None]:
        """The exit codes."""
        for pipe in self.pipes:
            with suppress(BrokenPipeError):
                pipe.send(None)
        for process in self.processes:
            process.join(5)
            process.kill()
        return [process.exitcode for process in self.processes]


@pytest.fixture(scope="module")
def two() -> Iterator[Callable[[Config, str], dict[str, Any]]]:
    """two(config, stage): `train` in two processes; the result of rank 0."""
    pair = Pair()

    def do(config: Config, stage: str) -> dict[str, Any]:
        nonlocal pair
        try:
            results = pair.do(config, stage)
        except (EOFError, BrokenPipeError):
            codes = pair.end()
            # torch's gloo thread has been seen to crash (pt_gloo_runloop in libc10); training goes on where it was
            assert -signal.SIGSEGV in codes, codes
            warnings.warn("a process crashed in native code and was started again", stacklevel=2)
            pair = Pair()
            results = pair.do(config, stage)
        assert all(isinstance(result, dict) for result in results), results
        return results[0]

    yield do
    pair.end()


def recipe(config: Config, stage: str, strategy: str, runs: Path, batch: int = 4, **options: Any) -> Config:
    """The config for a run of its own: `batch` samples a step, all at once or, under a strategy, half on each rank."""
    if strategy:
        options |= {"strategy": strategy, "devices": "2"}
        batch //= 2
    part: Any = getattr(config, stage)
    trainer = replace(part.trainer, accelerator="cpu", batch_size=batch, checkpoint_every=1, **options)
    # Adam makes a step of a gradient that is nothing but rounding, unless eps is above it.
    part = replace(part, trainer=trainer, optim=replace(part.optim, eps=1e-4, schedule="constant"))
    config = replace(config, runs=str(runs), **{stage: part})
    config.interpolation.frames = config.sr_low_video.frames = 3
    config.decoder.unet.dropout = 0.0  # the one thing that is drawn by rank
    config.decoder.unet.multiples = config.decoder.unet.attention = config.sr_low.unet.multiples = [1]
    if stage == "sr_low_video":
        config.sr_low_video.freeze_spatial = True
    for earlier in {"clip", build.STAGES[stage].grows_from} - {stage, ""}:
        path = build.run_folder(config, earlier) / "weights.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            save_file(some_weights(config, earlier), path)
    return config


def some_weights(config: Config, stage: str) -> dict[str, torch.Tensor]:
    """Weights of a stage that look trained: none are zero."""
    torch.manual_seed(1)
    state = build.network(config, stage).state_dict()
    return {k: (v + 0.05 * torch.randn_like(v)).contiguous() if v.is_floating_point() else v for k, v in state.items()}


def metrics(config: Config, stage: str) -> list[dict[str, float]]:
    with (build.run_folder(config, stage) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: float(row[k]) for k in ("loss", "gradient_norm", "probe") if row.get(k)} for row in rows]


def same(one: Config, other: Config, stage: str) -> None:
    """The same losses, gradient norms, weights, moments and averages, to rounding."""
    expected, found = metrics(one, stage), metrics(other, stage)
    assert len(expected) == len(found) == 5 and all(row["loss"] > 0 for row in expected[:4])
    for a, b in zip(expected, found, strict=True):
        assert a.keys() == b.keys()
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-5)
        assert a.get("probe", 0) == pytest.approx(b.get("probe", 0), rel=1e-5)
        assert a.get("gradient_norm", 0) == pytest.approx(b.get("gradient_norm", 0), rel=1e-3)
    a, b = (torch.load(build.run_folder(c, stage) / "checkpoints/last.ckpt", weights_only=True) for c in (one, other))
    (a_ema,), (b_ema,) = ([v for k, v in c["callbacks"].items() if k.startswith("EMA")] for c in (a, b))
    assert a_ema["updates"] == b_ema["updates"] == 4
    close(a["state_dict"], b["state_dict"])
    close(a_ema["average"], b_ema["average"])
    close(build.weights(one, stage), build.weights(other, stage))
    moments, others = (list(c["optimizer_states"][0]["state"].values()) for c in (a, b))
    assert len(moments) == len(others) > 5
    for x, y in zip(moments, others, strict=True):
        assert x["step"] == y["step"] == 4 and x["exp_avg"].shape == y["exp_avg"].shape
        assert (x["exp_avg"] - y["exp_avg"]).norm() <= 1e-3 * x["exp_avg"].norm() + 1e-6


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and len(one) > 10
    for key, value in one.items():
        assert type(other[key]) is type(value) and (value - other[key]).abs().max() < 1e-5, key


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config, str], Config]:
    """alone(config, stage): the config of a finished run of one process, made once."""

    @cache
    def folder(stage: str) -> Path:
        return tmp_path_factory.mktemp(stage)

    def do(config: Config, stage: str) -> Config:
        config = recipe(config, stage, "", folder(stage))
        if not build.finished(config, stage):
            train(config, stage)
        return config

    return do


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("stage", ["clip", "prior", "interpolation"])
def test_two_processes_train_as_one(fresh: Config, alone: Any, two: Any, tmp_path: Path, stage: str, strategy: str):
    config = recipe(fresh, stage, strategy, tmp_path)
    two(config, stage)
    same(alone(fresh, stage), config, stage)


def test_a_checkpoint_goes_on_under_every_strategy(fresh: Config, alone: Any, two: Any, tmp_path: Path) -> None:
    """A step under each strategy in turn, with frozen weights: the run of one process without a break."""
    stage = "sr_low_video"
    for step, strategy in enumerate(("", "fsdp", "ddp", "fsdp"), start=1):
        config = recipe(fresh, stage, strategy, tmp_path, max_steps=step)
        (two if strategy else train)(config, stage)
    same(alone(fresh, stage), config, stage)


def test_every_switch_at_once(fresh: Config, two: Any, tmp_path: Path) -> None:
    """bf16, accumulation, clipping, recomputed activations, the fused optimiser and compile under FSDP2.

    Half a batch at a time is the same step, so all of them together come near plain float32 in one process.
    """
    stage = "sr_low_video"
    plain = recipe(fresh, stage, "", tmp_path / "plain", max_steps=2)
    train(plain, stage)
    switches: dict[str, Any] = dict(precision="bf16-mixed", accumulate=2, clip_gradients=0.1, compile=True)
    config = recipe(fresh, stage, "fsdp", tmp_path / "all", batch=2, max_steps=2, **switches)
    config.sr_low.unet.checkpoint_activations = True
    config.sr_low_video.optim.fused = True
    result = two(config, stage)
    assert result["steps"] == 2 and result["graphs"] > 0
    expected, found = metrics(plain, stage), metrics(config, stage)
    for key, rows in (("probe", (0, 2)), ("gradient_norm", (0, 1))):
        for row in rows:
            assert found[row][key] == pytest.approx(expected[row][key], rel=0.03) and found[row][key] > 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_of_two_processes_scores_what_both_made(fresh: Config, two: Any, tmp_path: Path, strategy: str) -> None:
    config = recipe(fresh, "decoder_video", strategy, tmp_path, max_steps=2, validate_every=2)
    prior = build.run_folder(config, "prior") / "weights.safetensors"
    prior.parent.mkdir(parents=True)
    save_file(some_weights(config, "prior"), prior)
    assert two(config, "decoder_video")["steps"] == 2
    with (build.run_folder(config, "decoder_video") / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["preview/clipsim"]) and float(last["preview/fvd_random"]) >= 0

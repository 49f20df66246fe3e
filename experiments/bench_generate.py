"""`python -m experiments.bench_generate [key=value ...]`: what a film takes, stage by stage, at every size.

Operations and memory of a network call are those of a trace on empty tensors, for every size. Time is measured, with
fresh weights and the preset's settings, where a call is small enough for this machine: some steps of each stage's
sampler (one chunk of SR_h), of which all are alike. What the cascade adds is the time of these steps outside of the
networks.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments import build, memory
from experiments.cli import for_people, settings
from experiments.config import Config, load
from models.cascade import MakeAVideo, Stage
from models.sampling import STAGES
from models.unet import UNet


@dataclass
class Bench:
    """The benchmark."""

    sizes: list[str] = field(default_factory=lambda: ["tiny", "emoji", "small", "base", "paper"])
    overrides: list[str] = field(default_factory=lambda: ["cascade.preset=standard"])  # of every page
    steps: int = 4  # of each sampler that are measured, at most
    largest: float = 0.5  # TFLOP of a call that is still measured on a CPU; a GPU measures what fits into it
    compile: bool = False  # torch.compile the networks first, on a GPU
    output: str = "runs/bench/generate.json"


@dataclass
class Row:
    """One stage of one film. Bytes, 10^12 operations, seconds; None where it was not measured."""

    size: str
    stage: str
    calls: int  # of the network for a film
    tflop: float  # of a call
    memory: int  # weights, and the largest sum of tensors in a call
    seconds: float | None = None  # for a film
    rate: float | None = None  # calls a second in the cascade
    bare: float | None = None  # of the network alone, on the input of one of these calls
    overhead: float | None = None  # share of the film's time outside of the network


class Words:
    """A CLIP whose text embeddings are noise: the bench is of P, not of CLIP."""

    def __init__(self, config: Config):
        self.length, self.width = config.prior.model.context_length, config.clip.model.embedding_width

    def tokens(self, texts: list[str]) -> Tensor:
        return torch.ones(len(texts), self.length, dtype=torch.long)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(torch.randn(len(tokens), self.width, device=tokens.device), dim=-1)


def size_of(config: Config, stage: str) -> int:
    """The side of what a stage makes."""
    if stage == "prior":
        return 0
    return config.decoder.size if stage in ("decoder", "interpolation") else build.super_resolution(config, stage).size


def call_inputs(config: Config, stage: str, net: nn.Module) -> dict[str, Any]:
    """The inputs of a network call in a film: both halves of guidance are calls of their own."""
    cascade, width = config.cascade, config.clip.model.embedding_width
    rows = {"prior": cascade.candidates, "interpolation": cascade.windows}.get(stage, 1)
    t = torch.zeros(rows, dtype=torch.long)
    if stage == "prior":
        tokens = torch.ones(rows, config.prior.model.context_length, dtype=torch.long)
        return {"z": torch.zeros(rows, width), "t": t, "tokens": tokens, "text": torch.zeros(rows, width)}
    dense = (cascade.frames - 1) * cascade.skip + 1
    frames = {"decoder": cascade.frames, "interpolation": cascade.window, "sr_low": dense, "sr_high": cascade.chunk}
    x = torch.zeros(rows, 3, frames[stage], size_of(config, stage), size_of(config, stage))
    assert isinstance(net, UNet)
    given: dict[str, Any] = {"x": x, "t": t, **memory.conditions(net, x, width)}
    if stage == "sr_low":
        given["tile"] = cascade.tile
    return given


def traced(config: Config, stage: str, device: str, autocast: bool) -> Row:
    """Operations and memory of a stage."""
    net = memory.empty_network(config, build.film_stages(config)[stage])
    weights = 4 * sum(p.numel() for p in net.parameters())
    found = memory.trace(net, lambda net: net(**call_inputs(config, stage, net)), device, autocast, backward=False)
    alive = np.cumsum([size for _, size in found.events])
    sampling = config.cascade.sampling(stage)
    calls = sampling.steps * (2 if sampling.guidance != 1 else 1) * (chunks(config) if stage == "sr_high" else 1)
    return Row(config.size, stage, calls, found.flops / 1e12, weights + int(alive.max()))


def measured(config: Config, row: Row, bench: Bench, device: str, dtype: torch.dtype) -> Row:
    """The row with the times of some steps of its sampler."""
    name = row.stage
    last = build.film_stages(config)[name]
    net = build.network(config, last)
    stage = Stage(net, build.diffusion(config, last), size_of(config, name))
    steps = min(bench.steps, config.cascade.sampling(name).steps)
    cascade = replace(config.cascade, compile=bench.compile and device != "cpu")
    setattr(cascade, name, replace(cascade.sampling(name), steps=steps))
    maker = MakeAVideo(Words(config), *(stage,) * 5, config=cascade, device=device, dtype=dtype)  # type: ignore
    inside, calls, given = 0.0, 0, dict[str, Any]()

    def before(_: nn.Module, inputs: tuple[Any, ...], keys: dict[str, Any]) -> None:
        nonlocal inside, calls
        given.update(inputs=inputs, keys=keys)
        wait(device)
        inside, calls = inside - time.perf_counter(), calls + 1

    def after(*_: Any) -> None:
        nonlocal inside
        wait(device)
        inside += time.perf_counter()

    work = stage_call(maker, config, name)
    hooks = [net.register_forward_pre_hook(before, with_kwargs=True), net.register_forward_hook(after)]
    if device != "cpu" or row.tflop < 1:
        work()  # to warm up
    inside, calls = 0.0, 0
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    whole = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    bare = alone(lambda: net(*given["inputs"], **given["keys"]), calls, device, dtype)
    total = config.cascade.sampling(name).steps * (chunks(config) if name == "sr_high" else 1)
    # the film's steps, not its calls: both halves of guidance are one call on a GPU
    seconds = whole / steps * total
    return replace(row, seconds=seconds, rate=calls / whole, bare=bare, overhead=1 - inside / whole)


@torch.inference_mode()
def alone(call: Callable[[], Any], calls: int, device: str, dtype: torch.dtype) -> float:
    """Calls a second of a network on one input, in its film's precision."""
    with torch.autocast(device.split(":")[0], dtype, enabled=dtype != torch.float32):
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
    return calls / (time.perf_counter() - start)


def chunks(config: Config) -> int:
    """In how many chunks SR_h makes a film."""
    return math.ceil(((config.cascade.frames - 1) * config.cascade.skip + 1) / config.cascade.chunk)


def stage_call(maker: MakeAVideo, config: Config, name: str) -> Callable[[], Tensor]:
    """The arrow of a stage on random input; of SR_h one chunk."""
    cascade, width, side = config.cascade, config.clip.model.embedding_width, config.decoder.size
    embedding = torch.randn(1, width)
    dense = (cascade.frames - 1) * cascade.skip + 1
    if name == "prior":
        return lambda: maker.embed(["a fox"], [0])
    if name == "decoder":
        return lambda: maker.decode(embedding, cascade.fps, [0])
    if name == "interpolation":
        return lambda: maker.interpolate(torch.zeros(1, 3, cascade.frames, side, side), embedding, cascade.fps, [0])
    small = size_of(config, name) // build.super_resolution(config, name).factor
    if name == "sr_low":
        return lambda: maker.upsample_low(torch.zeros(1, 3, dense, small, small), cascade.fps * cascade.skip, [0])
    return lambda: maker.upsample_high(torch.zeros(1, 3, cascade.chunk, small, small), [0])


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def fits(row: Row, bench: Bench, device: str) -> bool:
    """Is a call small enough to be measured on this machine?"""
    if device == "cpu":
        return row.tflop <= bench.largest
    return row.memory < 0.8 * torch.cuda.mem_get_info()[0]


def table(rows: list[Row]) -> str:
    """The rows as a table for docs/films.md, with a film's total where all of it was measured."""
    lines = ["| size | stage | calls | TFLOP a call | memory GiB | seconds | calls/s | network alone | overhead |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        times = [f"{row.seconds:.1f}", f"{row.rate:.3g}", f"{row.bare:.3g}", f"{100 * row.overhead:.1f} %"] \
            if row.seconds is not None and row.overhead is not None else ["not measured", "", "", ""]  # fmt: skip
        cells = [row.size, row.stage, str(row.calls), f"{row.tflop:.3g}", f"{row.memory / 2**30:.2f}", *times]
        lines.append(f"| {' | '.join(cells)} |")
    for size in dict.fromkeys(row.size for row in rows):
        own = [row for row in rows if row.size == size]
        seconds = [row.seconds for row in own if row.seconds is not None]
        outside = sum(row.seconds * (row.overhead or 0) for row in own if row.seconds is not None)
        if len(seconds) == len(STAGES):
            lines.append(f"\n{size}: a film takes {sum(seconds):.0f} s, of which {100 * outside / sum(seconds):.1f} % "
                         "is outside of the networks")  # fmt: skip
    return "\n".join(lines)


@for_people
def main(arguments: list[str]) -> None:
    bench = settings(Bench, arguments)
    device = build.device()
    rows: list[Row] = []
    for size in bench.sizes:
        config = load(size, bench.overrides)
        mixed = build.precision(config.decoder.trainer.precision).startswith("bf16")
        for stage in STAGES:
            row = traced(config, stage, device.split(":")[0], mixed)
            if fits(row, bench, device):
                row = measured(config, row, bench, device, torch.bfloat16 if mixed else torch.float32)
            rows.append(row)
            print(f"{size} {stage}", file=sys.stderr, flush=True)
    print(table(rows))
    path = Path(bench.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])

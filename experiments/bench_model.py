"""`python -m experiments.bench_model [key=value ...]`: our D^t against published video U-Nets, in one process.

Every network gets the same clip, 16 frames of 64 x 64, and about the same number of parameters; the peers
(make-a-video-pytorch and diffusers, from PyPI, `pip install -e .[bench]`) as they come, with their width set. Times are
of a forward pass and of a training step (forward and backward), the best of `repeats`. On shared machines single times
mean little: what to quote is the share of a large matrix product measured beside them, and the ratios.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from experiments.cli import for_people
from experiments.config import load
from models.unet import UNet, UNetConfig

FRAMES, SIDE = 16, 64
EMBEDDING = 64


@dataclass
class Bench:
    """The benchmark. Levels, blocks and places of attention of the default network are those of the peers."""

    page: str = ""  # measure the D^t of this page of configs instead, as it is
    width: int = 64
    multiples: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    blocks: int = 1
    attention: list[int] = field(default_factory=lambda: [4, 8])
    head_width: int = 64
    batch_size: int = 1
    repeats: int = 3
    compile: bool = False  # also ours compiled; minutes on a CPU
    peers: bool = True
    profile: bool = False  # print where a training step of ours spends its time, by precision
    output: str = "runs/bench/model.json"


@dataclass
class Row:
    """What was measured of one network. Seconds, 10^9 operations a second, bytes."""

    name: str
    precision: str
    parameters: int
    forward: float
    forward_flops: float
    training: float
    training_flops: float
    peak_flops: float  # of the matrix product beside it, float32 on a CPU, bf16 on a GPU
    memory: int  # largest sum of tensors in a training step, weights and gradients included

    @property
    def forward_share(self) -> float:
        return self.forward_flops / self.forward / self.peak_flops

    @property
    def training_share(self) -> float:
        return self.training_flops / self.training / self.peak_flops


def ours(bench: Bench, **changes: Any) -> UNet:
    """D^t of the benchmark's shape."""
    shape = UNetConfig(
        width=bench.width,
        multiples=bench.multiples,
        blocks=bench.blocks,
        attention=bench.attention,
        head_width=bench.head_width,
    )
    if bench.page:
        shape = load(bench.page).decoder.unet
    return UNet(replace(shape, embedding_width=EMBEDDING, **changes), temporal=True)


def lucidrains(width: int) -> nn.Module:
    """make-a-video-pytorch's SpaceTimeUnet, without its compression of time, which would halve the work."""
    from make_a_video_pytorch import SpaceTimeUnet

    return SpaceTimeUnet(
        dim=width,
        channels=3,
        dim_mult=(1, 2, 4, 8),
        resnet_block_depths=(1, 1, 1, 2),
        temporal_compression=(False,) * 4,
        self_attns=(False, False, False, True),
        condition_on_timestep=True,
        attn_pos_bias=False,
        flash_attn=False,
    )


def diffusers(width: int) -> nn.Module:
    """diffusers' UNet3DConditionModel, with attention in its two deeper levels."""
    from diffusers import UNet3DConditionModel

    net: Any = UNet3DConditionModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(width, 2 * width, 4 * width, 8 * width),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=EMBEDDING,
        attention_head_dim=64,
        down_block_types=("DownBlock3D", "DownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "UpBlock3D", "UpBlock3D"),
    )
    return net


def matched(make: Callable[[int], nn.Module], wanted: int) -> nn.Module:
    """The network whose width brings its number of parameters nearest to the wanted one."""
    best, found = 16, 0
    for width in itertools.count(best, 8):
        with torch.device("meta"):
            size = parameters(make(width))
        if abs(size - wanted) < abs(found - wanted):
            best, found = width, size
        if size > wanted:
            break
    return make(best)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def call(net: nn.Module, batch: int, frames: int, device: str) -> Callable[[], Tensor]:
    """A forward pass on fixed random input, in the network's own signature."""
    x, t = torch.randn(batch, 3, frames, SIDE, SIDE, device=device), torch.full((batch,), 500, device=device)
    embedding = torch.randn(batch, EMBEDDING, device=device)
    if isinstance(net, UNet):
        fps = torch.full((batch,), 8.0, device=device)
        return lambda: net(x, t, embedding=embedding, fps=fps)
    if type(net).__name__ == "SpaceTimeUnet":
        return lambda: net(x, timestep=t.float())
    return lambda: net(x, t, embedding[:, None].expand(-1, 4, -1)).sample


def seconds(work: Callable[[], Any], repeats: int, device: str) -> float:
    """The best of some runs."""
    times = []
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_peak(device: str) -> float:
    """Operations a second of a large product of matrices: float32 on a CPU, bf16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    return 2 * n**3 / seconds(lambda: a @ b, 5, device)


def peak_memory(step: Callable[[], Any], resident: int, device: str) -> int:
    """The largest sum of tensor bytes during a step; `resident` = what is there before it starts."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return resident + peak


def measure(
    name: str,
    net: nn.Module,
    bench: Bench,
    device: str,
    precision: str,
    compiled: bool = False,
    plain: Row | None = None,
) -> Row:
    """A row of the table; operations are those of `plain`, if given, so that recomputing some does not count."""
    net = net.to(device)
    forward = call(net, bench.batch_size, FRAMES, device)

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")

    def train() -> None:
        net.zero_grad()  # to None: a step's gradients are part of its memory
        with autocast():
            output = forward()
        output.float().square().mean().backward()

    def infer() -> None:
        with torch.no_grad(), autocast():
            forward()

    with FlopCounterMode(display=False) as counter:
        infer()
    forward_flops = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        train()
    training_flops = counter.get_total_flops()
    if compiled:
        net.compile()
        train()
        infer()
    peaks = [matrix_peak(device)]
    forward_time = seconds(infer, bench.repeats, device)
    peaks.append(matrix_peak(device))
    training_time = seconds(train, bench.repeats, device)
    peaks.append(matrix_peak(device))
    net.zero_grad()
    memory = peak_memory(train, 4 * parameters(net), device)
    peak = sorted(peaks)[1]
    if plain is not None:
        forward_flops, training_flops = plain.forward_flops, plain.training_flops
    times = (forward_time, forward_flops, training_time, training_flops)
    return Row(name, precision, parameters(net), *times, peak, memory)


def table(rows: list[Row]) -> str:
    """Markdown; ratios are to the first row of ours."""
    first = next(row for row in rows if row.name == "ours")
    lines = [
        "| network | precision | parameters | forward ms | share of matrix peak | training step ms | share "
        "| peak GiB | step / ours | memory / ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.precision} | {row.parameters / 1e6:.1f} M | {1000 * row.forward:.0f} "
            f"| {row.forward_share:.2f} | {1000 * row.training:.0f} | {row.training_share:.2f} "
            f"| {row.memory / 2**30:.2f} | {row.training / first.training:.2f} | {row.memory / first.memory:.2f} |"
        )
    return "\n".join(lines)


def frames_ratio(net: UNet, bench: Bench, device: str, long: int = 76) -> float:
    """Time per frame of a forward pass at `long` frames over that at 16."""
    times = []
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        for frames in (FRAMES, long):
            forward = call(net, 1, frames, device)
            forward()
            times.append(seconds(forward, bench.repeats, device) / frames)
    return times[1] / times[0]


def optimiser_ratio(net: nn.Module, bench: Bench, device: str) -> float:
    """Time of AdamW's step, one kernel for all parameters (optim.fused) over the default."""
    times = []
    for fused in (True, False):
        optimiser = torch.optim.AdamW(net.parameters(), fused=fused)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimiser.step()
        times.append(seconds(optimiser.step, bench.repeats + 2, device))
    return times[0] / times[1]


def print_profile(net: UNet, bench: Bench, device: str, precision: str) -> None:
    """The ten operations that take most of a training step."""
    forward = call(net.to(device), bench.batch_size, FRAMES, device)
    for _ in range(2):
        with profile() as recorded, torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            forward().float().square().mean().backward()
    key = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, key))
    whole = sum(getattr(event, key) for event in events)
    print(f"\na training step of ours in {precision}, by operation:")
    for event in events[:10]:
        print(f"  {getattr(event, key) / whole:5.1%}  {event.count:5d} x  {event.key}")


@for_people
def main(arguments: list[str]) -> None:
    bench = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Bench), OmegaConf.from_cli(arguments)))
    assert isinstance(bench, Bench)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    rows: list[Row] = []

    def add(name: str, make: Callable[[], nn.Module], precision: str, compiled: bool = False) -> None:
        plain = next((row for row in rows if row.name == "ours" and row.precision == precision), None)
        variant = plain if name.startswith("ours, ") else None
        rows.append(measure(name, make(), bench, device, precision, compiled, variant))
        print(f"{name}, {precision}: training step {1000 * rows[-1].training:.0f} ms", flush=True)

    size = parameters(ours(bench))
    for precision in ("fp32", "bf16"):
        add("ours", lambda: ours(bench), precision)
        if bench.peers:
            add("make-a-video-pytorch", lambda: matched(lucidrains, size), precision)
            add("diffusers", lambda: matched(diffusers, size), precision)
    add("ours, checkpoint_activations", lambda: ours(bench, checkpoint_activations=True), "fp32")
    add("ours, not channels_last", lambda: ours(bench, channels_last=False), "fp32")
    if bench.compile or device == "cuda":
        add("ours, compiled", lambda: ours(bench), "fp32", compiled=True)
        add("ours, compiled", lambda: ours(bench), "bf16", compiled=True)

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{where}; matrix product {rows[0].peak_flops / 1e9:.0f} GFLOP/s; "
          f"{bench.batch_size} x {FRAMES} frames of {SIDE} x {SIDE}\n\n{table(rows)}\n")  # fmt: skip
    by_precision = {row.precision: row for row in rows if row.name == "ours"}
    ratios = {
        "fp32 step / bf16 step": by_precision["fp32"].training / by_precision["bf16"].training,
        "time per frame, 76 frames / 16": frames_ratio(ours(bench).to(device).eval(), bench, device),
        "AdamW step, fused / default": optimiser_ratio(ours(bench).to(device), bench, device),
    }
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    if bench.profile:
        for precision in ("fp32", "bf16"):
            print_profile(ours(bench), bench, device, precision)
    path = Path(bench.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": where, "rows": [asdict(row) for row in rows], "ratios": ratios}, indent=2))
    print(f"\n{path}")


if __name__ == "__main__":
    main(sys.argv[1:])

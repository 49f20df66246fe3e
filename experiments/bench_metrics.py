"""`python -m experiments.bench_metrics [key=value ...]`: what evaluation costs once the clips are decoded.

I3D's features a second, ours against the same network written plainly: contiguous memory, padding as an operation of
its own, batch norms apart, in eager PyTorch. Both have the same random weights and see the same clips, in turns; the
best of `repeats` each. Then the distances of `features` rows of 400, and their intervals. Ratios are what to quote.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from experiments.bench_model import seconds
from experiments.cli import for_people
from lightning_modules.metrics.distances import frechet_distance, frechet_influences, kernel_distance
from lightning_modules.metrics.video_metric import bootstrap
from models.i3d import I3D, MIXED, convert_keys, fold_batch_norm, random_i3d, same_padding


@dataclass
class Bench:
    batch_size: int = 4
    frames: int = 16
    repeats: int = 3
    features: int = 10_000  # rows of each kind
    compile: bool = False  # also ours compiled; minutes on a CPU
    output: str = "runs/bench/metrics.json"


def padded(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """TensorFlow's SAME, as zeros around a copy of x."""
    pads = [same_padding(n, k, s) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    return F.pad(x, [p for pair in reversed(pads) for p in pair])


class PlainUnit(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1):
        super().__init__()
        self.conv3d = nn.Conv3d(c_in, c_out, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv3d.kernel_size, self.conv3d.stride
        return F.relu(self.bn(self.conv3d(padded(x, kernel, stride))))


class PlainPool(nn.Module):
    def __init__(self, kernel: tuple[int, ...], stride: tuple[int, ...]):
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(padded(x, self.kernel, self.stride), self.kernel, self.stride)


class PlainMixed(nn.Module):
    def __init__(self, c_in: int, widths: tuple[int, ...]):
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = PlainUnit(c_in, b0, 1)
        self.b1a, self.b1b = PlainUnit(c_in, b1a, 1), PlainUnit(b1a, b1b, 3)
        self.b2a, self.b2b = PlainUnit(c_in, b2a, 1), PlainUnit(b2a, b2b, 3)
        self.b3a, self.b3b = PlainPool((3, 3, 3), (1, 1, 1)), PlainUnit(c_in, b3b, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


class PlainI3D(nn.Sequential):
    """The reference: the network as its description reads, with the weights of `random_i3d`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = PlainUnit(3, 64, 7, stride=2)
        self.MaxPool3d_2a_3x3 = PlainPool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = PlainUnit(64, 64, 1)
        self.Conv3d_2c_3x3 = PlainUnit(64, 192, 3)
        self.MaxPool3d_3a_3x3 = PlainPool((1, 3, 3), (1, 2, 2))
        c = 192
        for name, widths in MIXED.items():
            if name == "4b":
                self.MaxPool3d_4a_3x3 = PlainPool((3, 3, 3), (2, 2, 2))
            if name == "5b":
                self.MaxPool3d_5a_2x2 = PlainPool((2, 2, 2), (2, 2, 2))
            self.add_module(f"Mixed_{name}", PlainMixed(c, widths))
            c = widths[0] + widths[2] + widths[4] + widths[5]
        self.avg_pool = nn.AvgPool3d((2, 7, 7), stride=1)
        self.logits = nn.Sequential()
        self.logits.conv3d = nn.Conv3d(c, 400, 1)
        weights = {key: value.contiguous() for key, value in random_i3d().state_dict().items()}
        self.load_state_dict(convert_keys(weights))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(2).mean(2)


def in_turns(works: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """The best seconds of each, measured in turns, so that what else the machine does falls on all."""
    for work in works.values():
        work()
    rounds = [{name: seconds(work, 1, device) for name, work in works.items()} for _ in range(repeats)]
    return {name: min(times[name] for times in rounds) for name in works}


def networks(bench: Bench, device: str) -> dict[str, float]:
    """Clips a second of each network."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand(bench.batch_size, 3, bench.frames, 224, 224, generator=generator).to(device) * 2 - 1
    nets: dict[str, nn.Module] = {
        "plain": PlainI3D().to(device),
        "ours, batch norms apart": random_i3d().to(device),
        "ours": fold_batch_norm(random_i3d()).to(device),
    }
    if bench.compile or device == "cuda":
        compiled: I3D = fold_batch_norm(random_i3d()).to(device)
        compiled.compile()
        nets["ours, compiled"] = compiled
    with torch.no_grad():
        logits = nets["plain"](clips)
        for name, net in nets.items():
            error = float((net(clips) - logits).abs().max() / logits.std())
            if error > 1e-3:
                raise ValueError(
                    f"'{name}' computes other logits than the plain network, by {error:.2g} of their spread."
                )
        best = in_turns({name: partial(net, clips) for name, net in nets.items()}, bench.repeats, device)
    return {name: bench.batch_size / time for name, time in best.items()}


def distances(bench: Bench) -> dict[str, float]:
    """Seconds of each distance, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(bench.features, 400, generator=generator) * scale for scale in (1, 1.3))

    def interval() -> None:
        value, influences = frechet_influences(x, y)
        bootstrap(float(value), influences, 0.95, 1000, seed=0)

    works = {
        "Frechet distance": lambda: frechet_distance(x, y),
        "Frechet distance and interval": interval,
        "kernel distance and its derivatives": lambda: kernel_distance(x, y),
    }
    return in_turns(works, bench.repeats, "cpu")


@for_people
def main(arguments: list[str]) -> None:
    bench = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Bench), OmegaConf.from_cli(arguments)))
    assert isinstance(bench, Bench)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    rates, times = networks(bench, device), distances(bench)
    print(f"{where}; {bench.batch_size} clips of {bench.frames} frames at a time\n")
    print("| I3D, float32 | clips a second | / plain |\n|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.2f} | {rate / rates['plain']:.2f} |")
    print(f"\n| {bench.features:,} x 400 features of each kind | seconds |\n|---|---|")
    for name, time in times.items():
        print(f"| {name} | {time:.2f} |")
    path = Path(bench.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": where, "clips_per_second": rates, "seconds": times}, indent=2))
    print(f"\n{path}")


if __name__ == "__main__":
    main(sys.argv[1:])

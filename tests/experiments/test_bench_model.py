"""The benchmark: that its memory is memory, its match a match, and that it runs."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.bench_model import Bench, main, matched, ours, parameters, peak_memory


def test_peak_memory_is_the_largest_sum_of_living_tensors() -> None:
    def step() -> None:
        a = torch.zeros(1000)
        b = torch.zeros(3000)
        del a
        c = torch.zeros(500)
        del b, c

    assert peak_memory(step, 100, "cpu") == 100 + 4 * 4000


def test_recomputation_saves_memory() -> None:
    net = ours(Bench(width=16, multiples=[1, 2], attention=[2], head_width=16))
    x, t, embedding = torch.randn(1, 3, 4, 16, 16), torch.tensor([5]), torch.randn(1, 64)
    peaks = []
    for recompute in (False, True):
        for module in net.modules():
            if hasattr(module, "recompute"):
                module.recompute = recompute
        peaks.append(peak_memory(lambda: net(x, t, embedding=embedding).square().mean().backward(), 0, "cpu"))
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.parametrize("wanted, width", [(16 * 16, 16), (30 * 30, 32), (41 * 41, 40)])
def test_the_nearest_width_is_found(wanted: int, width: int) -> None:
    net = matched(lambda n: nn.Linear(n, n, bias=False), wanted)
    assert parameters(net) == width**2


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.json"
    shape = ["width=8", "multiples=[1,2,2]", "attention=[4]", "head_width=8"]
    main([*shape, "repeats=1", "peers=false", "profile=true", f"output={path}"])
    result = json.loads(path.read_text())
    assert [(row["name"], row["precision"]) for row in result["rows"]] == [
        ("ours", "fp32"),
        ("ours", "bf16"),
        ("ours, checkpoint_activations", "fp32"),
        ("ours, not channels_last", "fp32"),
    ]
    for row in result["rows"]:
        assert row["training"] > row["forward"] > 0 and row["training_flops"] > 2 * row["forward_flops"] > 0
    assert all(ratio > 0 for ratio in result["ratios"].values())
    shown = capsys.readouterr().out
    assert shown.count("| ours") == 4 and "by operation" in shown

"""The benchmark of the metrics runs, and its plain network computes what ours does."""

import json
from pathlib import Path

import pytest

from experiments.bench_metrics import Bench, main, networks


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "metrics.json"
    main(["batch_size=1", "frames=9", "repeats=1", "features=300", f"output={output}"])
    printed = capsys.readouterr().out
    assert "| plain |" in printed and "| ours |" in printed and "| Frechet distance |" in printed
    result = json.loads(output.read_text())
    assert set(result["clips_per_second"]) == {"plain", "ours", "ours, batch norms apart"}
    assert all(rate > 0 for rate in result["clips_per_second"].values())


def test_other_logits_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import experiments.bench_metrics as module

    monkeypatch.setattr(module, "fold_batch_norm", lambda net: module.random_i3d(seed=1))
    with pytest.raises(ValueError, match="'ours' computes other logits than the plain network"):
        networks(Bench(batch_size=1, frames=9, repeats=1))

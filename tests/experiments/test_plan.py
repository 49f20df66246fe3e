"""The plan says what is computed, and training warns of what will not fit."""

import subprocess
from pathlib import Path

import pytest

from experiments import plan
from experiments.config import Config, load
from experiments.memory import GIB, step
from experiments.plan import Plan, cost, global_batch, main, read, will_not_fit
from experiments.train import train


def test_time_and_dollars() -> None:
    """By hand, from the numbers of the settings."""
    config = load("tiny", ["trainer.max_steps=1000", "trainer.accumulate=2"], "sr_low")
    traced = step(config, "sr_low", batch=1)
    settings = Plan(gpus=4, peak=100.0, utilisation=0.5, price=3.0)
    found = cost(config, "sr_low", traced, settings)
    assert global_batch(config, "sr_low", 4) == 8 * 2 * 4
    seconds = 1000 * 8 * 2 * 4 * traced.flops / (4 * 100e12 * 0.5)
    assert found.hours == pytest.approx(seconds / 3600)
    assert found.dollars == pytest.approx(3 * 4 * seconds / 3600)
    assert found.samples == pytest.approx(1000 * 64 / seconds)


def test_the_table(fresh: Config, capsys: pytest.CaptureFixture[str]) -> None:
    main([fresh.page, "gpus=16", "memory=0.004", "prior.trainer.accumulate=3"])
    text = capsys.readouterr().out
    assert "a step is batch_size 2 x accumulate 3 x 16 GPUs = 96 samples" in text
    for title in ("CLIP:", "P:", "D:", "SR_l:", "SR_h:", "D^t:", "SR_l^t:", "SR_h on video:", "upF:", "in all"):
        assert f"\n{title}" in text, title
    rows = [line.split() for line in text.splitlines() if line.startswith(("  one GPU", "  DDP", "  FSDP2 over 8"))]
    assert len(rows) == 3 * 9
    assert {"fits", "large"} == {row[-2] for row in rows}  # of "too large"
    for row in rows:
        assert (row[-1] == "none") <= (row[-2] == "large"), row
    assert Plan(gpus=1).strategies == ("one GPU",)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("utilization=0.3", "utilisation"),
        ("gpus=0", "gpus must be more than 0"),
        ("price=cheap", "cheap"),
        ("decoder.trainr.batch_size=3", "decoder.trainer"),
    ],
)
def test_mistakes_are_told(argument: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        read("tiny", [argument])
    assert "\n" not in str(error.value)


def test_training_warns_and_goes_on(
    fresh: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda: 2**20)
    train(fresh, "clip")
    told = capsys.readouterr().err
    assert "warning: CLIP will not fit: a step of trainer.batch_size=2 takes" in told
    assert "make plan SIZE=" in told
    monkeypatch.setattr(plan, "available_memory", lambda: 1 / 0)
    plan.warn(fresh, "clip")
    assert "could not be computed: ZeroDivisionError" in capsys.readouterr().err


def test_the_warning_draws_the_line_at_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between what is sure to fit and what is sure not to, the step is traced."""
    config = load("tiny")
    peak = step(config, "sr_low", "cpu", 8).parts(8).peak
    for share, warned in ((0.98, True), (1.02, False)):
        monkeypatch.setattr(plan, "available_memory", lambda share=share: share * peak)
        assert bool(will_not_fit(config, "sr_low")) == warned, share
    monkeypatch.setattr(plan, "available_memory", lambda: 0.5 * peak)
    assert f"takes {peak / GIB:.1f} GiB" in will_not_fit(config, "sr_low")


def test_what_surely_fits_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "step", lambda *_: 1 / 0)
    assert will_not_fit(load("tiny"), "decoder") == ""


def test_make_plan() -> None:
    root = Path(__file__).parents[2]
    command = ["make", "-n", "plan", "SIZE=paper", "GPUS=64", "ARGS=price=2", "VENV=x"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert "-m experiments.plan paper gpus=64 price=2" in shown

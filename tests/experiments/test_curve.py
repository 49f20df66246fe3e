"""The curve of quality against calls: measured once, gone on with, and drawn as a picture that stands alone."""

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments import build, curve
from experiments.config import Config, load
from experiments.generate import make_cascade
from models.cascade import MakeAVideo
from models.sampling import SamplingConfig


class Means:
    """In place of I3D: the mean colours of a clip's frames."""

    name = "means"

    def __init__(self, *_: object) -> None:
        pass

    def to(self, _: object) -> "Means":
        return self

    def features(self, clips: Tensor) -> Tensor:
        return clips.float().mean(dim=(3, 4)).flatten(1)[:, :6]


def test_measured_once(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(curve, "FrechetVideoDistance", Means)
    monkeypatch.setattr(curve, "POINTS", {"ddim": ("ddim", 1.0, (1, 4)), "bent": ("dpmpp_2m", 1.5, (2, 25))})
    arguments = [str(page), "samples=3", "batch_size=2", "cascade.decoder.guidance=1"]
    curve.main(arguments)
    folder = build.run_folder(load(str(page)), "curve")
    first = (folder / "calls.json").read_text()
    found = json.loads(first)
    assert {name: list(steps) for name, steps in found["distances"].items()} == {
        "ddim": ["1", "4"],
        "bent": ["2", "25"],
    }
    assert found["metric"] == "means" and found["samples"] == 3
    ratio = found["distances"]["bent"]["25"] / found["distances"]["ddim"]["4"]
    assert found["standard"]["over_ddim_250"] == pytest.approx(ratio)
    assert len(list(folder.glob("ddim-4-*.safetensors"))) == 2  # a file for each batch
    # what a killed command has not done is done by the next, with the same numbers
    sorted(folder.glob("ddim-4-*.safetensors"))[0].unlink()
    (folder / "calls.svg").unlink()
    capsys.readouterr()
    curve.main(arguments)
    assert (folder / "calls.json").read_text() == first
    assert "standard (bent, 25 steps) is at" in capsys.readouterr().out
    picture = ElementTree.parse(folder / "calls.svg").getroot()
    marks = [node.text for node in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ddim", "bent", "5", "10"} <= set(marks)
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 4


def test_what_a_number_depends_on_is_in_the_name_of_its_file(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other settings are measured anew; the page's are kept where a point does not name them, and left as they were."""
    monkeypatch.setattr(curve, "FrechetVideoDistance", Means)
    monkeypatch.setattr(curve, "POINTS", {"ddim": ("ddim", 1.0, (1, 2))})
    monkeypatch.setitem(curve.PRESETS["standard"], "decoder", ("ddim", 1, 1.0))
    seen = []

    def made(config: Config) -> MakeAVideo:
        maker = make_cascade(config, on_step=lambda *_: None)
        decode = maker.decode
        monkeypatch.setattr(maker, "decode", lambda *given: seen.append(maker.config.decoder) or decode(*given))
        return maker

    monkeypatch.setattr(curve, "make_cascade", made)
    always = ["evaluate.samples=2", "evaluate.batch_size=2", "cascade.decoder.guidance=1"]
    changes = ["cascade.fps=4", "cascade.prior.guidance=2", "cascade.decoder.rescale=0.5", "evaluate.prompt='{}!'"]
    for change in ["seed=8", *changes]:
        config = load(str(page), [*always, "cascade.frames=3", change])
        before = asdict(config.cascade)
        curve.by_calls(config)
        assert len(seen) == 2 and asdict(config.cascade) == before, change
        wanted = replace(config.cascade.decoder, sampler="ddim", steps=1, bend=1.0)
        assert seen[0] == wanted
        seen.clear()
    curve.by_calls(load(str(page), [*always, "cascade.frames=3", changes[-1]]))
    assert not seen


def test_under_guidance_a_step_is_two_calls() -> None:
    assert curve.calls(SamplingConfig(steps=25)) == 25 and curve.calls(SamplingConfig(steps=25, guidance=2)) == 50


def test_ratios_under_guidance_are_of_the_points_themselves(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "FrechetVideoDistance", Means)
    monkeypatch.setattr(curve, "POINTS", {"ddim": ("ddim", 1.0, (1, 4)), "bent": ("dpmpp_2m", 1.5, (25,))})
    config = load(str(page), ["evaluate.samples=2", "cascade.decoder.guidance=2", "cascade.frames=2"])
    found = curve.by_calls(config)
    assert list(found["distances"]["ddim"]) == [2, 8] and list(found["distances"]["bent"]) == [50]
    ratio = found["distances"]["bent"][50] / found["distances"]["ddim"][8]
    assert found["standard"]["over_ddim_250"] == pytest.approx(ratio)


def test_by_guidance(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distance and CLIPSIM of each strength, of clips that differ, and two panels of the picture."""
    monkeypatch.setattr(curve, "FrechetVideoDistance", Means)
    monkeypatch.setattr(curve, "GUIDANCE", (1.0, 3.0))
    curve.main([str(page), "over=guidance", "samples=3", "batch_size=2"])
    folder = build.run_folder(load(str(page)), "curve")
    found = json.loads((folder / "guidance.json").read_text())
    assert list(found["distance"]) == list(found["clipsim"]) == ["1.0", "3.0"]
    for values in (found["distance"], found["clipsim"]):
        assert values["1.0"] != values["3.0"] and all(map(math.isfinite, values.values()))
    assert all(-1 <= value <= 1 for value in found["clipsim"].values())
    circles = ElementTree.parse(folder / "guidance.svg").getroot().iter("{http://www.w3.org/2000/svg}circle")
    assert len(list(circles)) == 4
    with pytest.raises(SystemExit, match="over=steps: a curve is over calls or guidance"):
        curve.main([str(page), "over=steps"])


def test_more_calls_are_further_right_and_less_distance_further_down() -> None:
    text = curve.picture([curve.panel({"ddim": [(5, 9.0), (250, 1.0)]}, "of 16", (5, 250), logarithmic=True)])
    dots = [node for node in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}circle")]
    (x, y), (x2, y2) = ((float(dot.get("cx", 0)), float(dot.get("cy", 0))) for dot in dots)
    assert x < x2 and y < y2
    assert torch.tensor([x, x2, y, y2]).isfinite().all()

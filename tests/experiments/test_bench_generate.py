"""The benchmark of films: every stage has a row, and what is too large is said to be."""

import json
from pathlib import Path

import pytest
import torch

from experiments import bench_generate
from experiments.bench_generate import Bench, alone, call_inputs, chunks, main, traced
from experiments.config import load, sizes
from models.sampling import STAGES


def test_rows_of_a_film(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bench" / "generate.json"
    main([f"sizes=[{page},tiny]", "steps=1", "largest=0.04", f"output={output}"])
    text = capsys.readouterr().out
    rows = json.loads(output.read_text())
    assert [row["stage"] for row in rows] == [*STAGES] * 2
    large = {row["stage"]: row for row in rows[5:]}
    assert large["sr_high"]["seconds"] is None and "| tiny | sr_high | 60 |" in text and "not measured" in text
    for row in rows[:5]:
        assert row["rate"] > 0 and row["bare"] > 0 and 0 <= row["overhead"] < 1
        assert row["seconds"] > 0 and row["memory"] > 0 and row["tflop"] > 0
    assert "micro: a film takes" in text


def test_the_network_alone_is_called_as_often_in_its_precision() -> None:
    seen = []
    rate = alone(lambda: seen.append(torch.ones(2, 2) @ torch.ones(2, 2)), 3, "cpu", torch.bfloat16)
    assert [x.dtype for x in seen] == [torch.bfloat16] * 3 and rate > 0 and seen[0].is_inference()


def test_calls_and_inputs_of_a_film() -> None:
    """76 frames at the page base's sides; SR_h in ten chunks."""
    config = load("base", ["cascade.preset=paper"])
    assert chunks(config) == 10
    row = traced(config, "prior", "cpu", True)
    assert row.calls == 64 and row.memory > 4 * 300e6 and row.tflop > 0.05
    with torch.device("meta"):
        net = bench_generate.build.network(config, "sr_low_video")
        inputs = call_inputs(config, "sr_low", net)
    assert inputs["x"].shape == (1, 3, 76, 256, 256) and inputs["tile"] == config.cascade.tile
    assert set(Bench().sizes) == set(sizes())


def test_tiles_bound_the_memory_of_a_call() -> None:
    """Of SR_l^t on 36 frames: beside the features that are kept between layers, those of a tile."""
    pages = [load("tiny", [f"cascade.tile={tile}", "cascade.frames=8"]) for tile in (4, 0)]
    tiled, whole = (traced(page, "sr_low", "cpu", True).memory for page in pages)
    assert tiled < 0.8 * whole


def test_a_mistyped_key_is_a_sentence() -> None:
    with pytest.raises(SystemExit, match="there is no key 'size'; did you mean 'sizes'"):
        main(["size=[tiny]"])
    with pytest.raises(SystemExit, match="not of the form key=value"):
        main(["tiny"])

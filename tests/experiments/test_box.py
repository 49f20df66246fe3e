"""Weights that a page comes with: used until the stages are trained here, and never beside a CLIP of one's own."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments import build, films
from experiments.config import Config, load
from experiments.export import export
from experiments.films import Request
from experiments.generate import main
from lightning_modules.media import read_note
from models.cascade import MakeAVideo


@pytest.fixture(scope="module")
def box(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's networks in half precision, as `make export ARGS=half=true` writes them."""
    return export(load(str(page)), str(tmp_path_factory.mktemp("box") / "pretrained"), half=True)


@pytest.fixture
def boxed(page: Path, box: Path, tmp_path: Path) -> Config:
    """The page where nothing has been trained, with the box."""
    return replace(load(str(page)), runs=str(tmp_path / "runs"), pretrained=str(box))


def test_a_film_of_the_box_is_that_of_its_folder(boxed: Config, box: Path) -> None:
    """To the last bit, under the same digest, whether by the page or by from_pretrained."""
    maker, other = build.cascade(boxed), MakeAVideo.from_pretrained(str(box), config=boxed.cascade)
    assert maker.digest() == other.digest()
    assert {value.dtype for value in load_file(box / "decoder.safetensors").values()} == {torch.float16}
    one, two = (m.text_to_video(["a fox"], [3], "decoded").last()[0] for m in (maker, other))
    assert torch.equal(one, two)


def test_what_was_trained_here_comes_first(boxed: Config, page: Path) -> None:
    """A stage with a run folder is that of the run; with a CLIP of one's own nothing is taken from the box."""
    runs, trained = Path(boxed.runs) / boxed.size, build.run_folder(load(str(page)), "")
    for stage in ("prior", "clip"):
        assert build.weights_path(boxed, stage).parent == Path(boxed.pretrained)
    shutil.copytree(trained / "prior", runs / "prior")
    assert build.weights_path(boxed, "prior").parent == runs / "prior"
    assert build.weights_path(boxed, "decoder_video").name == "decoder.safetensors"
    with pytest.raises(FileNotFoundError, match="stage 'decoder' .*: run `make train-decoder SIZE="):
        build.weights_path(boxed, "decoder")  # the image network is not in the box: D^t is
    shutil.copytree(trained / "clip", runs / "clip")
    with pytest.raises(FileNotFoundError, match="stage 'decoder_video' .*make finetune-video.*belong to another"):
        build.cascade(boxed)
    shutil.rmtree(runs / "clip")
    assert build.cascade(boxed)


def test_a_file_that_is_not_the_pages_is_refused(boxed: Config, box: Path, tmp_path: Path) -> None:
    """Damaged, of another model, or of another network or process than the page has."""
    other = shutil.copytree(box, tmp_path / "other")
    (other / "decoder.safetensors").write_bytes((box / "decoder.safetensors").read_bytes()[:1000])
    shutil.copy(box / "sr_low.safetensors", other / "sr_high.safetensors")
    broken = replace(boxed, pretrained=str(other))
    with pytest.raises(ValueError, match="decoder.safetensors is damaged"):
        build.weights(broken, "decoder_video")
    with pytest.raises(ValueError, match="sr_high.safetensors is not the file that its config.json"):
        build.weights(broken, "sr_high_video")
    for text in ("{}", "["):
        (other / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json is not the page of a model, or damaged"):
            build.weights(broken, "prior")
    process = replace(boxed.decoder.diffusion, schedule="linear")
    for wrong, stage, key in (
        (replace(boxed, decoder=replace(boxed.decoder, diffusion=process)), "interpolation", "diffusion"),
        (replace(boxed, sr_low=replace(boxed.sr_low, finetune_on_video=False)), "sr_low", "temporal"),
        (replace(boxed, clip=replace(boxed.clip, model=replace(boxed.clip.model, head_width=8))), "clip", "head_width"),
    ):
        with pytest.raises(ValueError, match=f"was trained with another {key} than this config has"):
            build.weights(wrong, stage)


def test_a_page_that_extends_another_has_none_of_its_weights(box: Path, page: Path, tmp_path: Path) -> None:
    own, further = tmp_path / "own.yaml", tmp_path / "further.yaml"
    own.write_text(page.read_text() + f"pretrained: {box}\n")
    further.write_text(f"extends: {own}\nseed: 3\n")
    assert load(str(own)).pretrained == str(box) and load(str(further)).pretrained == ""
    assert load(str(further)).clip.model == load(str(own)).clip.model


def test_the_side_of_a_film_ends_it(boxed: Config) -> None:
    """SIZE_OUT names the stage that makes it, a stop of the request's own wins, and there is no other side."""
    maker = build.cascade(boxed)
    sides = {0: "high", boxed.sr_high.size: "high", boxed.sr_low.size: "low", boxed.decoder.size: "interpolated"}
    for side, stop in sides.items():
        wanted = replace(boxed, generate=replace(boxed.generate, size_out=side))
        assert films.settled(wanted, Request(prompt="a fox")).stop == stop
        assert films.note(wanted, Request(prompt="a fox"), maker)["stop"] == stop
        assert films.settled(wanted, Request(prompt="a fox", stop="decoded")).stop == "decoded"
    with pytest.raises(ValueError, match="no stage makes films of 100 pixels: SIZE_OUT is one of 16, 32, 64"):
        films.make(replace(boxed, generate=replace(boxed.generate, size_out=100)), Request(prompt="a fox"), maker)


def test_by_the_command_and_again_from_its_file(
    page: Path, box: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [f"runs={tmp_path / 'runs'}"]
    own = tmp_path / "boxed.yaml"
    own.write_text(page.read_text() + f"pretrained: {box}\ngenerate: {{size_out: 32}}\n")
    main([str(own), "text", "a fox", "seed=4", "cascade.frames=3", *where])
    first = Path(capsys.readouterr().out.splitlines()[0])
    note, data = read_note(first), first.read_bytes()
    assert note["stop"] == "low" and note["model"] == MakeAVideo.from_pretrained(str(box)).digest()
    first.unlink()
    main(["again", str(shutil.copy(first.with_suffix(".png"), tmp_path / "sheet.png")), *where])
    assert first.read_bytes() == data

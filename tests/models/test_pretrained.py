"""The cascade as a folder: the same film from it, without Lightning, and damage is named."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.cascade import MakeAVideo
from models.clip import Clip, build_clip
from models.diffusion import Diffusion

ROOT = Path(__file__).parents[2]
PROMPTS, SEEDS = ["a red fox"], [7]


@pytest.fixture
def folder(cascade, tmp_path):
    cascade.save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model"


def test_the_same_film(cascade, folder):
    again = MakeAVideo.from_pretrained(str(folder))
    assert again.config == cascade.config and again.clip.name == cascade.clip.name
    one, two = (maker.text_to_video(PROMPTS, SEEDS, "low") for maker in (cascade, again))
    for name in ("embedding", "decoded", "interpolated", "low"):
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    long = "a " * 10_000 + "\U0001f98a лиса 狐"
    assert torch.equal(cascade.clip.tokens([long]), again.clip.tokens([long]))


def test_the_digest_is_of_the_weights(cascade, folder):
    again = MakeAVideo.from_pretrained(str(folder))
    assert len(cascade.digest()) == 16 and again.digest() == cascade.digest()
    assert json.loads((folder / "config.json").read_text())["model"] == cascade.digest()
    again.weights_digest = ""
    with torch.no_grad():
        next(again.sr_high.net.parameters())[0] += 1e-3
    assert again.digest() != cascade.digest()


def test_half(cascade, folder, tmp_path):
    """float16 on the disk is half of it; bfloat16 in memory half of that; films stay near."""
    cascade.save_pretrained(str(tmp_path / "half"), half=True)
    size = {name: (tmp_path / name / "decoder.safetensors").stat().st_size for name in ("model", "half")}
    assert size["half"] < 0.6 * size["model"]
    embedding = torch.randn(1, 16)
    exact = cascade.decode(embedding, 6.0, SEEDS)
    halved = MakeAVideo.from_pretrained(str(tmp_path / "half"))
    assert halved.digest() != cascade.digest()
    rough = MakeAVideo.from_pretrained(str(folder), dtype=torch.bfloat16)
    assert rough.digest() == cascade.digest()
    assert {p.dtype for p in rough.decoder.net.parameters()} == {torch.bfloat16}
    for other in (halved, rough):
        made = other.decode(embedding, 6.0, SEEDS)
        assert not torch.equal(made, exact) and (made - exact).abs().mean() < 0.05
    film = rough.text_to_video(PROMPTS, SEEDS, "high")
    assert film.high.dtype == torch.float32 and film.high.isfinite().all()


def test_neither_lightning_nor_pages_are_needed(cascade, folder):
    """In another process, where they cannot be imported."""
    expected = cascade.text_to_video(PROMPTS, SEEDS, "decoded").decoded
    program = f"""
import sys
import torch

for name in ("lightning", "pytorch_lightning", "omegaconf", "wandb", "experiments", "lightning_modules", "datamodules"):
    sys.modules[name] = None
from models.cascade import MakeAVideo
from models.clip import Clip, build_clip
from models.diffusion import Diffusion

maker = MakeAVideo.from_pretrained({str(folder)!r})
torch.save(maker.text_to_video({PROMPTS}, {SEEDS}, "decoded").decoded, {str(folder / "film.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert torch.equal(torch.load(folder / "film.pt", weights_only=True), expected)


def test_damage_is_named(folder, tmp_path):
    def refused(words, error=ValueError):
        with pytest.raises(error, match=words):
            MakeAVideo.from_pretrained(str(folder))

    with pytest.raises(FileNotFoundError, match="no model in .*nowhere"):
        MakeAVideo.from_pretrained(str(tmp_path / "nowhere"))
    path = folder / "decoder.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:1000])
    refused("decoder.safetensors is damaged")
    state = load_file(folder / "sr_low.safetensors")
    save_file(state, path)
    refused("decoder.safetensors is not the file")
    path.unlink()
    refused("lacks .*decoder.safetensors", FileNotFoundError)
    path.write_bytes(sound)
    page = json.loads((folder / "config.json").read_text())
    for change in ({"format": 1}, {"stages": {}}, {"cascade": {"frames": 0}}):
        (folder / "config.json").write_text(json.dumps(page | change))
        refused("config.json is not the page of a model")
    (folder / "config.json").write_text("{")
    refused("config.json is not the page of a model")


def test_the_digest_is_of_shapes_and_processes_too(cascade, folder):
    """The same weights under another schedule make another film; what matters in training alone does not."""
    known = cascade.digest()

    def changed(**values):
        cascade.weights_digest, process = "", cascade.sr_low.diffusion
        cascade.sr_low.diffusion = Diffusion(replace(process.config, **values))
        found, cascade.sr_low.diffusion = cascade.digest(), process
        return found

    for values in ({"schedule": "linear"}, {"prediction": "v"}, {"zero_terminal_snr": True}):
        assert changed(**values) != known
    assert changed(min_snr_gamma=5.0) == changed() == known
    page = json.loads((folder / "config.json").read_text())
    page["stages"]["decoder"]["diffusion"]["prediction"] = "v"
    (folder / "config.json").write_text(json.dumps(page))
    with pytest.raises(ValueError, match="config.json is not the page .* edited since it was written"):
        MakeAVideo.from_pretrained(str(folder))


def test_a_named_clip_keeps_its_colours(cascade, tmp_path, monkeypatch):
    """open_clip knows mean and deviation of a name with its pretrained weights alone."""
    cascade.clip = Clip(cascade.clip.model, "RN/some", config=replace(cascade.clip.config, name="RN"))
    cascade.clip.mean = torch.full((3,), 0.5)
    cascade.save_pretrained(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="config.json is not the page of a model"):  # no such name
        MakeAVideo.from_pretrained(str(tmp_path / "model"))
    monkeypatch.setattr("models.pretrained.open_clip.create_model", lambda name, **_: build_clip(cascade.clip.config))
    monkeypatch.setattr("models.pretrained.open_clip.get_tokenizer", lambda name: cascade.clip.tokenizer)
    again = MakeAVideo.from_pretrained(str(tmp_path / "model"))
    assert again.clip.mean.tolist() == [0.5] * 3 and again.digest() == cascade.digest()


def test_what_was_there_stays_until_all_is_written(cascade, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("models.pretrained.save_file", full)
    with pytest.raises(OSError, match="no space"):
        cascade.save_pretrained(str(folder), half=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

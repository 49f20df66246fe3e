"""Films of every use from files, their notes, and what people get for bad input: a sentence. Weights are fresh."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import build, films, generate
from experiments.config import Config, load
from experiments.export import main as export
from experiments.films import Request
from experiments.generate import main
from lightning_modules.media import read_note, write
from models.cascade import MakeAVideo

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def config(page: Path) -> Config:
    return load(str(page))


@pytest.fixture(scope="module")
def maker(config: Config) -> MakeAVideo:
    return generate.make_cascade(config, on_step=lambda *_: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two pictures, a film of two seconds and one of a single frame, and files that are none."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    for name, size in (("one.png", (40, 60)), ("two.jpg", (64, 48))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).resize((size[1], size[0])).save(folder / name)
    clip = torch.linspace(-0.9, 0.9, 48)[None, :, None, None].expand(3, 48, 32, 32)
    for name, frames in (("film", 48), ("still", 1)):
        write(folder / name, clip[:, :frames], 24.0, "mp4")
    (folder / "text.png").write_text("no picture")
    (folder / "text.mp4").write_text("no film")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.mp4").write_bytes((folder / "film.mp4").read_bytes()[:-200])
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    (folder / "cut.jpg").write_bytes((folder / "two.jpg").read_bytes()[:400])
    return {path.name: str(path) for path in folder.iterdir()}


def requests(files: dict[str, str]) -> list[Request]:
    return [
        Request(prompt="a fox", seed=3),
        Request("animate", inputs=(files["one.png"],)),
        Request("between", inputs=(files["one.png"], files["two.jpg"]), weight=0.3),
        Request("extend", inputs=(files["film.mp4"],), forward=1, backward=1),
        Request("vary", inputs=(files["film.mp4"],), seed=5),
        Request("edit", "a blue fox", inputs=(files["two.jpg"],), before="a fox"),
    ]


@pytest.mark.parametrize("i", range(6))
def test_every_use_and_the_same_film_from_its_note(
    config: Config, maker: MakeAVideo, files: dict[str, str], i: int
) -> None:
    """A note makes the request, the settings and so the film again, to the last bit."""
    request = replace(requests(files)[i], stop="interpolated")
    film = films.make(config, request, maker)
    assert list(film.clips()) == ["decoded", "interpolated"] and film.last()[0].isfinite().all()
    note = json.loads(json.dumps(films.note(config, request, maker)))
    again, settings, dtype = films.remake(note, "film.mp4")
    assert again == request and settings == maker.config.resolved() and dtype == maker.dtype
    other = films.make(config, again, MakeAVideo(maker.clip, **maker.stages(), config=settings))
    assert torch.equal(film.last()[0], other.last()[0])


def test_a_film_is_made_again_from_its_file(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, in another format, with the page's settings changed since: frame for frame the same."""
    formats = "formats=[png,webp,gif,webm,mp4]"
    main([str(page), "text", "a fox", "seed=4", formats, "cascade.decoder.steps=3", "stop=low"])
    out = capsys.readouterr().out
    assert "frames at a time: D^t 16, upF 80, SR_l^t 76" in out and "GiB" in out
    folder = build.run_folder(load(str(page)), "films")
    pictures = [path.read_bytes() for path in sorted((folder / "a-fox-4").iterdir())]
    assert len(pictures) == 76 and (folder / "a-fox-4.png").is_file()
    for suffix in ("mp4", "webm", "gif", "webp"):
        note = read_note(folder / f"a-fox-4.{suffix}")
        assert (note["prompt"], note["seed"], note["cascade"]["decoder"]["steps"]) == ("a fox", 4, 3)
        assert len(note["model"]) == 16 and len(note["config"]) == 8
    for path in (folder / "a-fox-4").iterdir():
        path.write_bytes(b"")
    main(["again", str(folder / "a-fox-4.webm"), "formats=[png]"])
    assert [path.read_bytes() for path in sorted((folder / "a-fox-4").iterdir())] == pictures


def test_another_model_is_refused(
    page: Path, maker: MakeAVideo, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = films.note(config, Request(prompt="a fox"), maker) | {"model": "0" * 16}
    monkeypatch.setattr(generate, "read_note", lambda path: note)
    with pytest.raises(SystemExit, match=f"made by the model 0000.*{maker.digest()}, and would make another film"):
        main(["again", "film.mp4"])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"make-a-video": 7}, "does not say how it was made"),
        ({"seed": None}, "another version, or damaged|seed"),
        ({"dtype": "load"}, "another version, or damaged"),
        ({"cascade": {"frames": "many"}}, "another version, or damaged"),
        ({"cascade": {"frames": 0}}, "cascade.frames is 0"),
        ({"inputs_sha256": []}, "another version, or damaged|shorter"),
        ({"inputs_sha256": ["0" * 64]}, "has changed since film.mp4 was made of it"),
    ],
)
def test_notes_that_are_wrong(
    config: Config, maker: MakeAVideo, files: dict[str, str], change: dict[str, object], words: str
) -> None:
    note = films.note(config, Request("animate", inputs=(files["one.png"],)), maker) | change
    with pytest.raises(ValueError, match=words):
        films.remake(note, "film.mp4")


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["text", ""], "the prompt is empty"),
        (["text", " \n"], "the prompt is empty"),
        (["text", "a fox", "seed=-1"], "seed is a whole number"),
        (["text", "a fox", "seed=many"], "a number is wanted"),
        (["text", "a fox", "stop=end"], "no stage 'end'"),
        (["text", "a fox", "formats=[avi]"], "avi.*name one or more of mp4, webm, gif, webp, png"),
        (["text", "a fox", "cascade.frames=0"], "cascade.frames is 0"),
        (["text", "a fox", "cascade.frames=-16"], "cascade.frames is -16"),
        (["text", "a fox", "cascade.preset=best"], "preset 'best' is not one of draft, standard, paper"),
        (["text", "a fox", "and more"], "not of the form key=value"),
        (["animate"], "animate takes a picture, not 0 files"),
        (["animate", ""], "no file was named"),
        (["animate", "nowhere.png"], "there is no file nowhere.png"),
        (["animate", "text.png"], "text.png: the image cannot be decoded"),
        (["animate", "empty.png"], "empty"),
        (["animate", "cut.jpg"], "cut.jpg: the image cannot be decoded"),
        (["animate", "huge.png"], "huge.png: the image cannot be decoded .*at most 50 megapixels"),
        (["animate", "film.mp4"], "film.mp4: the image cannot be decoded"),
        (["between", "one.png"], "between takes a first picture and a last one, not 1 files"),
        (["between", "one.png", "two.jpg", "weight=2"], "0 ... 1, not 2"),
        (["extend", "still.mp4"], "still.mp4: .*two frames or more"),
        (["extend", "text.mp4"], "text.mp4: the video cannot be opened"),
        (["extend", "cut.mp4"], "cut.mp4: "),
        (["extend", "one.png"], "one.png: "),
        (["extend", "film.mp4", "forward=0"], "say how often"),
        (["extend", "film.mp4", "forward=1000"], "extended 1 to 100 times"),
        (["vary", "still.mp4"], "still.mp4: .*two frames or more"),
        (["edit", "one.png", ""], "the prompt is empty"),
        (["edit", "one.png", "a fox", "before=a fox"], "nothing to change"),
    ],
)
def test_bad_input_is_answered_with_a_sentence(
    page: Path,
    maker: MakeAVideo,
    files: dict[str, str],
    words: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cascade(config: Config) -> MakeAVideo:
        return MakeAVideo(maker.clip, **maker.stages(), config=config.cascade)

    monkeypatch.setattr(generate, "make_cascade", cascade)
    named = [files.get(word, word) for word in words]
    with pytest.raises(SystemExit, match=f"(?s)^error: .*{sentence}") as error:
        main([str(page), *named])
    assert "\n" not in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize(
    "prompt",
    [
        "狐と月",
        "лиса и луна",
        "ثعلب",
        "\U0001f98a\U0001f319",
        "a\x07b\u202e",
        "\ud83d",
        "../../etc/passwd",
        "-",
        "x=y",
        "a" * 300,
    ],
    ids=range(10),
)
def test_prompts_of_all_kinds(config: Config, maker: MakeAVideo, prompt: str, tmp_path: Path) -> None:
    request = Request(prompt=prompt, stop="decoded")
    here = replace(config, runs=str(tmp_path), generate=replace(config.generate, formats=["mp4", "gif"]))
    path, sheet = generate.film(here, request, maker)
    assert path.parent == tmp_path / "micro" / "films" and len(path.name) < 80
    assert read_note(path)["prompt"] == prompt and sheet.is_file()


def test_a_prompt_of_ten_thousand_characters(config: Config, maker: MakeAVideo, tmp_path: Path) -> None:
    prompt = "a very long fox " * 625
    with pytest.warns(UserWarning, match="more tokens than CLIP reads"):
        path, _ = generate.film(replace(config, runs=str(tmp_path)), Request(prompt=prompt, stop="decoded"), maker)
    assert read_note(path)["prompt"] == prompt


def test_the_smaller_copy_of_a_large_film(config: Config, maker: MakeAVideo, tmp_path: Path) -> None:
    """As the paper shows 768 pixels at 512: here 16 at 12."""
    here = replace(config, runs=str(tmp_path), generate=replace(config.generate, formats=["png"], presentation=12))
    path, _ = generate.film(here, Request(prompt="a fox", stop="decoded"), maker)
    assert Image.open(path / "0000.png").size == (16, 16)
    small = path.with_name(path.name + "-12px")
    assert Image.open(small / "0000.png").size == (12, 12) and read_note(small) == read_note(path)


def test_a_long_video_is_extended_at_one_end(
    config: Config, maker: MakeAVideo, files: dict[str, str], tmp_path: Path
) -> None:
    clip = torch.linspace(-0.9, 0.9, 400)[None, :, None, None].expand(3, 400, 16, 16)
    path = str(write(tmp_path / "long", clip, 25.0, "mp4"))  # 80 frames at 5 per second
    for forward, first, last in ((1, None, 0.9), (0, -0.9, None)):
        request = Request("extend", inputs=(path,), forward=forward, backward=1 - forward)
        frames, fps = films.film_frames(request, maker)
        level = frames.float().mean(dim=(0, 1, 3, 4)) / 127.5 - 1
        assert len(level) == films.MOST_FRAMES and fps == pytest.approx(5.0, rel=0.01)
        assert first is None or abs(level[0] - first) < 0.05
        assert last is None or abs(level[-1] - last) < 0.05
    with pytest.raises(ValueError, match="too long to be extended both ways"):
        films.film_frames(Request("extend", inputs=(path,), forward=1, backward=1), maker)


def test_export(page: Path, maker: MakeAVideo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export([str(page), f"folder={tmp_path}/whole"])
    export([str(page), f"folder={tmp_path}/half", "half=true"])
    assert "MiB" in capsys.readouterr().out
    assert MakeAVideo.from_pretrained(f"{tmp_path}/whole").digest() == maker.digest()
    assert MakeAVideo.from_pretrained(f"{tmp_path}/half").digest() != maker.digest()
    with pytest.raises(SystemExit, match="neither true nor false"):
        export([str(page), "half=some"])

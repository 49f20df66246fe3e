"""Films of every use from files, their notes, and what people get for bad input: a sentence. Weights are fresh."""

import json
import os
import re
import shutil
import subprocess
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
from experiments.samples import samples
from lightning_modules.media import read_note, write
from models.cascade import MakeAVideo
from models.sampling import SamplingConfig


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
    assert "a-fox-4-" in out
    frames = Path(out.splitlines()[0])  # the first of the formats
    assert frames.parent == folder and re.fullmatch("a-fox-4-[0-9a-f]{6}", frames.name)
    pictures = [path.read_bytes() for path in sorted(frames.iterdir())]
    assert len(pictures) == 76
    for suffix in ("mp4", "webm", "gif", "webp", "png"):  # the last is the contact sheet
        note = read_note(frames.with_name(f"{frames.name}.{suffix}"))
        assert (note["prompt"], note["seed"], note["cascade"]["decoder"]["steps"]) == ("a fox", 4, 3)
        assert len(note["model"]) == 16 and len(note["config"]) == 8
    for path in frames.iterdir():
        path.write_bytes(b"")
    main(["again", f"{frames}.webm", "formats=[png]"])
    assert [path.read_bytes() for path in sorted(frames.iterdir())] == pictures
    for word in ("seed=5", "cascade.preset=draft", "prompt=a cat"):
        with pytest.raises(SystemExit, match=f"made again as it was, so '{word}' cannot be asked"):
            main(["again", f"{frames}.webm", word])


def test_another_process_is_another_model(page: Path, maker: MakeAVideo) -> None:
    """The same weights under another schedule or prediction, as of a page that was edited, are refused by notes."""
    for change in ("decoder.diffusion.schedule=linear", "sr_low.diffusion.schedule=linear", "sr_high.size=96"):
        other = generate.make_cascade(load(str(page), [change]), on_step=lambda *_: None)
        assert other.digest() != maker.digest(), change


def test_films_of_one_name_do_not_overwrite_each_other(config: Config, maker: MakeAVideo, tmp_path: Path) -> None:
    here = replace(config, runs=str(tmp_path))
    kinds = ["a fox", "a fox!", "лиса", "狐", "\U0001f98a", "\U0001f319"]
    paths = [generate.film(here, Request(prompt=prompt, stop="decoded"), maker)[0] for prompt in kinds]
    assert len({path.name for path in paths}) == 6 and [read_note(path)["prompt"] for path in paths] == kinds
    words = [path.stem.rsplit("-", 2)[0] for path in paths]
    assert words == ["a-fox", "a-fox", "лиса", "狐", "film", "film"]
    settings = replace(maker.config, decoder=SamplingConfig(steps=1))
    again = MakeAVideo(maker.clip, **maker.stages(), config=settings)
    assert generate.film(here, Request(prompt="a fox", stop="decoded"), again)[0] not in paths
    assert generate.film(here, Request(prompt="a fox", stop="decoded"), maker)[0] == paths[0]
    found = {film.path.name: film.prompt for film in samples(paths[0].parent, [])}
    assert [found[path.name] for path in paths] == kinds  # as the pages of films read them
    long = generate.film_name(Request(prompt="\U00020000" * 100, seed=2**48 - 1), {})
    assert len(f"{long}-512px.webm.part".encode()) < 255


def test_inputs_that_have_moved(config: Config, maker: MakeAVideo, files: dict[str, str], tmp_path: Path) -> None:
    """Are named anew, and known by what they hold."""
    request = Request("between", inputs=(files["one.png"], files["two.jpg"]))
    note = films.note(config, replace(request, inputs=(os.path.relpath(files["one.png"]), files["two.jpg"])), maker)
    assert note["inputs"] == list(request.inputs)  # from any folder
    moved = tmp_path / "elsewhere.png"
    shutil.copyfile(files["one.png"], moved)
    note["inputs"][0] = "/nowhere/one.png"
    with pytest.raises(FileNotFoundError, match="one.png has moved: name it with IMAGE= or TO=."):
        films.remake(note, "film.mp4")
    assert films.remake(note, "film.mp4", [str(moved)])[0].inputs == (str(moved), files["two.jpg"])
    with pytest.raises(ValueError, match="empty.png is empty"):
        films.remake(note, "film.mp4", [files["empty.png"]])
    with pytest.raises(ValueError, match="text.png is not what film.mp4 was made of"):
        films.remake(note, "film.mp4", [files["text.png"]])
    uploaded = films.note(config, Request("vary", inputs=(files["film.mp4"],)), maker, uploaded=True)
    assert uploaded["inputs"] == ["film.mp4"]
    with pytest.raises(FileNotFoundError, match="film.mp4 was uploaded to the page, which keeps .* with VIDEO=."):
        films.remake(uploaded, "film.mp4")
    assert films.remake(uploaded, "film.mp4", [files["film.mp4"]])[0].inputs == (files["film.mp4"],)


def test_make_hands_on_what_was_written() -> None:
    """To the letter: nothing in a sentence or a name is for make or the shell."""

    def said(*words: str) -> list[str]:
        command = ["make", "-s", "RUN=printf '<%s>'", *words]
        env = {key: value for key, value in os.environ.items() if key in ("PATH", "HOME")}
        env["CONDA_DEFAULT_ENV"] = "make-a-video"  # where make installs nothing
        root = Path(__file__).parents[2]
        out = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
        return out.stdout[1:-1].split("><")[2:]

    evil = """a "fox" costs $5, `exit 1` $(error no) it's # \\ 50%"""
    assert said("generate", f"PROMPT={evil}", "SEED=3") == ["emoji", "text", evil, "seed=3"]
    assert said("animate", f"IMAGE={evil}") == ["emoji", "animate", evil]
    assert said("between", f"IMAGE={evil}", f"TO={evil}") == ["emoji", "between", evil, evil]
    assert said("vary", f"VIDEO={evil}") == ["emoji", "vary", evil]
    assert said("edit", "IMAGE=a", f"BEFORE={evil}") == ["emoji", "edit", "a", "", f"before={evil}"]  # which is refused
    assert said("generate", f"FROM={evil}", "FORMATS=gif") == ["again", evil, "formats=[gif]"]
    assert said("generate", "FROM=f.mp4", f"TO={evil}", "SEED=1") == ["again", "f.mp4", f"input={evil}", "seed=1"]
    assert said("animate", "IMAGE=a", "SIZE=tiny", "SIZE_OUT=768") == ["tiny", "animate", "a", "size_out=768"]
    assert said("generate")[2] == "a 3D emoji of octopus" and said("generate", "PROMPT=")[2] == ""


def test_ctrl_c_says_what_is_left(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(config: Config) -> MakeAVideo:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "make_cascade", pressed)
    with pytest.raises(SystemExit, match="interrupted: this film was not written"):
        main([str(page), "a fox"])


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
        ({"seed": None}, r"another version, or damaged \(seed is None"),
        ({"forward": "x"}, r"another version, or damaged \(forward is 'x'"),
        ({"inputs": [3]}, "another version, or damaged"),
        ({"cascade": "x: ["}, "another version, or damaged"),
        ({"cascade": "x"}, "another version, or damaged"),
        ({"cascade": [1]}, "another version, or damaged"),
        ({"cascade": {"frames": 8}}, "is damaged: its settings are not those of its digest"),
        ({"config": "0" * 8}, "is damaged: its settings are not those of its digest"),
        ({"dtype": "load"}, "another version, or damaged"),
        ({"cascade": {"frames": "many"}}, "another version, or damaged"),
        ({"cascade": {"frames": 0}}, "cascade.frames is 0"),
        ({"inputs_sha256": []}, "another version, or damaged"),
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
        (["text", "seed=3"], "'seed=3' stands where the sentence should"),
        (["seed=3", "stop=low"], "'seed=3' stands where the sentence should"),
        (["edit", "one.png", "before=a fox"], "'before=a fox' stands where"),
        (["animate", "cascade.frames=3"], "'cascade.frames=3' stands where a picture should"),
        (["text", "a fox", "cascade.fps=1e-9"], "cascade.fps is 1e-09: give a rate"),
        (["text", "a fox", "cascade.sr_low.noise_level=5000"], "cascade.sr_low has .* its diffusion has 1000"),
        (["text", "a fox", "cascade.decoder.steps=5000"], "cascade.decoder has 5000 steps"),
        (["text", "a fox", "cascade.decoder.guidance=nan"], "cascade.decoder.guidance is nan"),
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

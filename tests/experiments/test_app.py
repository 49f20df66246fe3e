"""The page of `make app`: a person in a real browser types, uploads and presses, and films play."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experiments import app
from experiments.config import load
from experiments.generate import make_cascade
from lightning_modules.media import read_note
from models.sampling import CascadeConfig, SamplingConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def address(page: Path, tmp_path: Path) -> Iterator[str]:
    """The page of the micro cascade, started as a user does; nothing of what was uploaded outlives it."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (make app installs it: pip install -e '.[app]')")
    (tmp_path / "tmp").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as outside:  # a proxy: who wants to leave the machine comes here
        outside.setblocking(False)
        proxy = f"http://127.0.0.1:{outside.getsockname()[1]}"
        proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), proxy)
        env = {**os.environ, **proxies, "TMPDIR": str(tmp_path / "tmp")}
        command = [sys.executable, "-m", "experiments.app", str(page)]
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        yield process.stdout.readline().split()[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        with pytest.raises(BlockingIOError):
            outside.accept()
    assert not list((tmp_path / "tmp").glob("make-a-video-*"))


def toast(browser: Any, words: str) -> None:
    """Wait for a sentence and take it away."""
    browser.wait(f"[...document.querySelectorAll('.toast-body')].some((t) => t.innerText.includes({words!r}))")
    text = browser.js("[...document.querySelectorAll('.toast-body')].map((t) => t.innerText).join(' ')")
    assert "Traceback" not in text and "make-a-video-" not in text, text  # nor the folder of uploads
    browser.js("document.querySelectorAll('.toast-close').forEach((b) => b.click())")
    browser.wait("!document.querySelector('.toast-body')")


def press_until_answered(browser: Any, selector: str) -> None:
    """Press a button until there is a toast: Gradio draws a page before it listens to it."""
    answered = "new Promise((done) => setTimeout(() => done(!!document.querySelector('.toast-body')), 3000))"
    for _ in range(30):
        browser.click(selector)
        if browser.js(answered):
            return


def tab(browser: Any, use: str) -> None:
    names = [title for title, _ in app.TITLES.values()]
    browser.js(f"[...document.querySelectorAll('[role=tab]')].find((t) => t.innerText == "
               f"{names[list(app.TITLES).index(use)]!r}).click()")  # fmt: skip
    browser.wait(f"document.querySelector('#make-{use}')?.offsetParent != null")


def plays(browser: Any, use: str) -> str:
    """Wait for the film of a tab to play; returns what is told of it."""
    video = f"document.querySelector('#film-{use} video')"
    browser.wait(f"{video}?.readyState > 2 && {video}.duration > 0 && {video}.videoWidth == 64", 180)
    browser.wait(f"{video}.currentTime > 0 || {video}.played.length > 0")
    browser.wait(f"document.querySelectorAll('#frames-{use} img').length > 3")
    return str(browser.wait(f"document.querySelector('#told-{use}').innerText"))


def test_a_person_makes_films(address: str, browser: Any, page: Path, tmp_path: Path) -> None:
    picture, clip = tmp_path / "fox.png", ROOT / "experiments/demo/clips/mp4/1f419.mp4"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)).save(picture)
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:60])
    with (tmp_path / "huge.mp4").open("wb") as file:
        file.truncate(101 * 2**20)
    films = page.parent / "runs" / "micro" / "films"

    browser.open(address)
    browser.wait("document.querySelector('#make-text')?.offsetParent != null")
    assert browser.js("document.querySelectorAll('[role=tab]').length") == len(app.films.USES)
    press_until_answered(browser, "#make-text")
    toast(browser, "the prompt is empty")
    browser.click("#prompt-text textarea")
    browser.type("a 3D emoji of <b>fox</b> 狐 🦊")
    browser.click("#make-text")
    told = plays(browser, "text")
    (film,) = films.glob("a-3d-emoji-of-b-fox-b-狐-0-??????.mp4")
    assert "seed 0" in told and film.name in told and read_note(film)["prompt"] == "a 3D emoji of <b>fox</b> 狐 🦊"
    browser.wait("document.querySelector('#download-text')?.disabled === false")
    browser.click("#download-text")
    saved = tmp_path / "downloads" / film.name
    for _ in range(600):
        if saved.is_file():
            break
        browser.js("new Promise((done) => setTimeout(done, 50))")
    assert saved.read_bytes() == film.read_bytes()

    kept = []
    for use, files in (("animate", [picture]), ("between", [picture, picture]), ("extend", [clip]), ("vary", [clip]),
                       ("edit", [picture])):  # fmt: skip
        tab(browser, use)
        for i, path in enumerate(files):
            browser.upload(f"#{use}-file{i} input[type=file]", path)
            browser.wait(f"document.querySelector('#{use}-file{i} img, #{use}-file{i} .file-preview') != null")
        kept += [p for p in (tmp_path / "tmp").rglob("*") if p.name in (picture.name, clip.name)]
        assert kept
        if use == "edit":
            browser.click("#prompt-edit textarea")
            browser.type("a cat")
        browser.click(f"#make-{use}")
        assert use in plays(browser, use)
        browser.wait(
            f"!document.querySelector('#{use}-file0 img, #{use}-file0 .file-preview')"
        )  # the field is empty again
        assert not [
            p for p in (tmp_path / "tmp").rglob("*") if p.name in (picture.name, clip.name)
        ]  # and its file gone

    tab(browser, "animate")
    browser.click("#make-animate")
    toast(browser, "a picture is missing")
    browser.upload("#animate-file0 input[type=file]", tmp_path / "broken.png")
    browser.wait("document.querySelector('#animate-file0 img') != null")
    browser.click("#make-animate")
    toast(browser, "broken.png: the image cannot be decoded")
    tab(browser, "vary")
    browser.upload("#vary-file0 input[type=file]", tmp_path / "huge.mp4")
    toast(browser, "exceed the maximum allowed size")
    posted = "const form = new FormData(); form.append('files', new Blob([new Uint8Array(101 * 2 ** 20)]), 'huge.mp4');"
    answer = "fetch('/gradio_api/upload', {method: 'POST', body: form}).then((answer) => answer.status)"
    assert browser.js(f"(() => {{ {posted} return {answer}; }})()") == 413  # the server, too, refuses it
    assert not [p for p in (tmp_path / "tmp").rglob("*") if p.name in ("broken.png", "huge.mp4")]

    port = int(address.rstrip("/").rsplit(":", 1)[1])
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]
    assert [entry for entry in listening if int(entry.split(":")[1], 16) == port] == [f"0100007F:{port:04X}"]
    outside = [a for a in browser.asked() if not a.startswith((address, "data:", "blob:", "about:"))]
    assert not outside, outside


def test_a_film_has_the_side_that_was_chosen(page: Path, tmp_path: Path) -> None:
    """It ends with the stage of that side, and so does the progress."""
    parts = ("Progress", "Warning", "Error", "DownloadButton")
    gr = SimpleNamespace(**{name: lambda *_, **__: None for name in parts})
    config = replace(load(str(page)), runs=str(tmp_path))
    fields = {name: name for name in ("prompt", "side", "preset")}
    make = app.action(gr, config, make_cascade(config=load(str(page))), "text", fields)
    steps: list[str] = []
    given = {"prompt": "a fox", "side": config.decoder.size, "preset": "draft"}
    path, told, *_ = make(given, lambda _, desc: steps.append(desc))
    note = read_note(Path(path))
    assert note["stop"] == "interpolated" and note["cascade"]["preset"] == "draft" and "16 x 16" in told
    assert steps[0].startswith("1 of 3, P") and steps[-1].startswith("3 of 3, upF")


def test_without_gradio_there_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*app.QUIET, "GRADIO_TEMP_DIR", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match="gradio is not installed: `make app` installs it"):
        app.main(["tiny"])
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_what_is_asked() -> None:
    with pytest.raises(ValueError, match="a first picture is missing"):
        app.asked("between", {"seed": 3}, [None, None])
    assert app.asked("text", {"prompt": "a cat", "seed": 7}, []).seed == 7
    drawn = [app.asked("text", {"prompt": "a cat", "seed": seed}, []).seed for seed in (-1, None)]
    assert drawn[0] != drawn[1] and min(drawn) >= 0
    with pytest.raises(ValueError, match="the seed is a whole number"):
        app.asked("text", {"prompt": "a cat", "seed": -2}, [])
    assert app.asked("extend", {"forward": None, "backward": 2}, [__file__]).forward == 0


def test_presets_and_errors() -> None:
    settings = CascadeConfig(decoder=SamplingConfig("ddim", 3, guidance=2.0))
    assert app.sampled(settings, app.OWN) is settings
    draft = app.sampled(settings, "draft").sampling("decoder")
    assert (draft.sampler, draft.steps, draft.guidance) == ("dpmpp_2m", 10, 2.0)
    error = ValueError("trace\n/x/y/fox.png: <img src=x>")
    assert app.sentence(error, ["/x/y/fox.png", None]) == "fox.png: &lt;img src=x&gt;"

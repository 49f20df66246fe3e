"""`python -m experiments.app SIZE [key=value ...]`: the cascade as a page in the browser, a tab for each of its uses.

The page is for this machine alone: it is bound to 127.0.0.1, one film is made at a time and a few may wait. What is
uploaded is read as a picture or a video, deleted once its film is made, and at the latest when the page is stopped.
Nothing is fetched from or sent to any other machine. Films go to `<runs>/<size>/films`, as those of `make generate`.
"""

import logging
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from experiments import build, films
from experiments.cli import for_people
from experiments.config import Config, load
from experiments.films import Request
from experiments.generate import NETWORKS, make_cascade, write_film
from lightning_modules.media import to_uint8
from models.cascade import STOPS, Film, MakeAVideo
from models.sampling import OF_PRESET, PRESETS, STAGES, CascadeConfig

log = logging.getLogger(__name__)

TITLES = {
    "text": ("Text to video", "A film for a sentence."),
    "animate": ("Animate a picture", "The picture is the first frame; what follows is made."),
    "between": ("Between two pictures", "The passage from one picture to the other."),
    "extend": ("Extend a film", "What comes after a film, and what came before."),
    "vary": ("Variation", "A new film of what a film or its first frame shows."),
    "edit": ("Edit by text", "A film of what a picture shows, changed as a text says."),
}
UPLOAD = "100mb"  # of one file
WAITING = 8  # films that may wait for their turn
KEPT = 3600  # seconds that uploads nobody used, and copies of films for the page, stay
SHOWN = 16  # frames beside the film
OWN = "of the config"  # the preset that leaves steps and samplers as they are there

# Read by Gradio and by the hub's client, which it imports, when they are imported.
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


def gradio(folder: Path) -> Any:
    """The library, told to stay at home and to keep files in `folder`. ValueError where it is not installed."""
    os.environ.update(QUIET, GRADIO_TEMP_DIR=str(folder))
    for name in ("NO_PROXY", "no_proxy"):  # it asks its own address whether it is up
        os.environ[name] = ",".join(filter(None, [os.environ.get(name, ""), "127.0.0.1"]))
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{error.name} is not installed: `make app` installs it, or pip install -e '.[app]'."
        ) from None
    return gr


def page(gr: Any, config: Config, maker: MakeAVideo) -> Any:
    """The page as Gradio's Blocks, a tab for each use of `experiments.films`."""
    with gr.Blocks(title="Make-A-Video", analytics_enabled=False, delete_cache=(60, KEPT)) as blocks:
        gr.Markdown(
            f"# Make-A-Video\n{escape(config.page)}, {config.cascade.frames} frames of the decoder, on this machine"
        )
        for use, (title, about) in TITLES.items():
            with gr.Tab(title, id=use):
                gr.Markdown(about)
                with gr.Row():
                    with gr.Column(scale=2):
                        fields = {**fields_of(gr, use), **settings_of(gr, config)}
                        button = gr.Button("Make the film", variant="primary", elem_id=f"make-{use}")
                    with gr.Column(scale=3):
                        outputs = [
                            gr.Video(
                                label="The film",
                                autoplay=True,
                                loop=True,
                                height=400,
                                interactive=False,
                                elem_id=f"film-{use}",
                            ),
                            gr.Markdown(elem_id=f"told-{use}"),
                            gr.DownloadButton("Download the film", interactive=False, elem_id=f"download-{use}"),
                            gr.Gallery(label="Its frames", columns=8, format="png", elem_id=f"frames-{use}"),
                        ]
            uploads = [field for name, field in fields.items() if name.startswith("file")]
            event = button.click(action(gr, config, maker, use, fields), set(fields.values()), outputs,
                                 show_progress_on=outputs[0], concurrency_limit=1, concurrency_id="film",
                                 api_visibility="private")  # fmt: skip
            if uploads:  # they are deleted, so they are not shown as if they were there
                empty = [None] * len(uploads) if len(uploads) > 1 else None
                event.then(lambda empty=empty: empty, None, uploads, queue=False, api_visibility="private")
    blocks.queue(max_size=WAITING, default_concurrency_limit=1)
    return blocks


def fields_of(gr: Any, use: str) -> dict[str, Any]:
    """What a use asks for, by the names of `Request`; files as file0, file1."""
    found = {}
    for i, what in enumerate(films.USES[use].inputs):
        label = what.capitalize()
        if "video" in what:
            field = gr.File(label=label, file_types=["video"], elem_id=f"{use}-file{i}")
        else:
            field = gr.Image(
                label=label, sources=["upload"], type="filepath", image_mode=None, elem_id=f"{use}-file{i}"
            )
        # Gradio opens what was uploaded, and its errors are for programmers: the path alone is wanted
        field.preprocess = lambda payload: payload and payload.path
        found[f"file{i}"] = field
    if use == "text":
        found["prompt"] = gr.Textbox(
            label="What the film shows", placeholder="a 3D emoji of octopus", elem_id="prompt-text"
        )
    if use == "edit":
        found["prompt"] = gr.Textbox(label="What it becomes", elem_id="prompt-edit")
        found["before"] = gr.Textbox("a photo", label="What the picture shows")
        found["weight"] = gr.Slider(0, 1, 0.35, label="How far towards it")
    if use == "extend":
        found["forward"] = gr.Number(1, precision=0, label="How often forward")
        found["backward"] = gr.Number(0, precision=0, label="How often backward")
    return found


def settings_of(gr: Any, config: Config) -> dict[str, Any]:
    """What every use asks for."""
    sides = list(films.sides(config))
    with gr.Row():
        return {"seed": gr.Number(0, precision=0, label="Seed, -1 to draw one"),
                "preset": gr.Dropdown([OWN, *PRESETS], value=OWN, label="Sampling"),
                "side": gr.Dropdown(sides, value=config.generate.size_out or sides[-1], label="Pixels")}  # fmt: skip


def action(gr: Any, config: Config, maker: MakeAVideo, use: str, fields: dict[str, Any]) -> Callable[..., Any]:
    """What the button of a use does."""

    def make(values: dict[Any, Any], progress: Any = gr.Progress()) -> tuple[Any, ...]:  # noqa: B008
        given = {name: values[field] for name, field in fields.items()}
        uploads = [given.pop(name) for name in list(given) if name.startswith("file")]
        maker.config = sampled(config.cascade, given.pop("preset"))
        wanted = replace(config, generate=replace(config.generate, size_out=given.pop("side")))
        last = STOPS.index(films.last_stage(wanted)) + 1
        maker.on_step = lambda stage, step, steps: progress(
            (step, steps), desc=f"{STAGES.index(stage) + 1} of {last}, {NETWORKS.get(stage, 'P')}"
        )
        start = time.monotonic()
        try:
            request = asked(use, given, uploads)
            if maker.clip.truncated(request.prompt):
                gr.Warning("The text has more words than CLIP reads: its end is ignored.")
            made = films.make(wanted, request, maker)
            path, _ = write_film(config, made, request, films.note(wanted, request, maker, uploaded=bool(uploads)))
        except (ValueError, OSError, RuntimeError) as error:
            raise gr.Error(sentence(error, uploads), duration=None, print_exception=False) from None
        except Exception:
            log.exception("The film was not made:")
            raise gr.Error(
                "The film was not made; the terminal says more.", duration=None, print_exception=False
            ) from None
        finally:
            for upload in filter(None, uploads):
                Path(upload).unlink(missing_ok=True)
        clip, fps = made.last()
        told = (f"{clip.shape[2]} frames of {clip.shape[-1]} x {clip.shape[-2]}, {fps:.3g} a second, seed "
                f"**{request.seed}**, {time.monotonic() - start:.0f} s: `{path}`")  # fmt: skip
        return str(path), told, gr.DownloadButton(value=str(path), interactive=True), frames(made)

    return make


def asked(use: str, given: dict[str, Any], uploads: list[str | None]) -> Request:
    """What the fields of a tab ask for. Raises ValueError for what is missing or cannot be."""
    for upload, what in zip(uploads, films.USES[use].inputs, strict=True):
        if not upload or not Path(upload).is_file():
            raise ValueError(f"{what} is missing: choose the file, also again, as uploads are deleted after their use.")
    values = {name: value for name, value in given.items() if value not in (None, "")}
    if use == "extend":
        values = {"forward": 0, **values}
    if values.get("seed", -1) == -1:
        values["seed"] = secrets.randbelow(2**31)
    return Request(use, inputs=tuple(map(str, uploads)), **values)


def sampled(settings: CascadeConfig, preset: str) -> CascadeConfig:
    """The settings with the samplers and steps of a preset, or as they are."""
    if preset == OWN:
        return settings
    stages = {stage: replace(getattr(settings, stage), **OF_PRESET) for stage in STAGES}
    return replace(settings, preset=preset, **stages)  # type: ignore[arg-type]


def sentence(error: Exception, uploads: list[str | None]) -> str:
    """An error as a person reads it: no paths of uploads, no HTML (Gradio would draw it)."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    for upload in filter(None, uploads):
        text = text.replace(upload, Path(upload).name)
    return escape(text)


def frames(film: Film) -> list[tuple[np.ndarray, str]]:
    """At most `SHOWN` frames of the film, evenly over it, as uint8 `h w 3` with their numbers."""
    pictures = to_uint8(film.last()[0][0])
    chosen = np.unique(np.linspace(0, len(pictures) - 1, SHOWN).round().astype(int))
    return [(pictures[i], str(i)) for i in chosen]


def launch(config: Config, maker: MakeAVideo, folder: Path, port: int | None = None) -> Any:
    """Start the page and return it, `.local_url` its address; the first free port from 7860 unless one is given."""
    gr = gradio(folder)
    formats = ["mp4", *(form for form in config.generate.formats if form != "mp4")]  # the first is played
    config = replace(config, generate=replace(config.generate, formats=formats))
    build.run_folder(config, "films").mkdir(parents=True, exist_ok=True)
    blocks = page(gr, config, maker)
    blocks.launch(
        server_name="127.0.0.1", server_port=port, share=False, inbrowser=False, prevent_thread_lock=True, quiet=True,
        max_file_size=UPLOAD, allowed_paths=[str(build.run_folder(config, "films").resolve())], footer_links=[],
        run_history=False, enable_monitoring=False, mcp_server=False, pwa=False, ssr_mode=False, show_error=False,
    )  # fmt: skip
    return blocks


@for_people
def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m experiments.app SIZE [key=value ...]")
    with tempfile.TemporaryDirectory(prefix="make-a-video-") as folder:
        gradio(Path(folder))  # before the minute that networks may take to load
        config = load(arguments[0], arguments[1:], section="generate")
        films.last_stage(config)  # a side that there is not is told now
        signal.signal(signal.SIGTERM, stop)  # so that what was uploaded is deleted then, too
        blocks = launch(config, make_cascade(config), Path(folder))
        print(
            f"{blocks.local_url} is open to this machine alone; Ctrl-C stops it and deletes what was uploaded",
            flush=True,
        )
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            blocks.close(verbose=False)


def stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main(sys.argv[1:])

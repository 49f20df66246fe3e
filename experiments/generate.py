"""Films: for a sentence, of pictures and of other films.

    python -m experiments.generate SIZE "a sentence" [key=value ...]
    python -m experiments.generate SIZE animate PICTURE [key=value ...]
    python -m experiments.generate SIZE between PICTURE PICTURE [weight=0.5 ...]
    python -m experiments.generate SIZE extend VIDEO [forward=1 backward=0 ...]
    python -m experiments.generate SIZE vary VIDEO [key=value ...]
    python -m experiments.generate SIZE edit PICTURE "what it becomes" [before="what it shows" weight=0.35 ...]
    python -m experiments.generate again FILM [input=PICTURE ... formats=[mp4] presentation=512 runs=...]

Writes `<runs>/<size>/films/<title>-<seed>-<digest of the note>` in the formats of the section `generate`, and beside it
a contact sheet with a row for each stage. `again` makes a film anew from the note that it carries, the weights that it
names and the files that it was made of, which `input=` names where they have moved.
"""

import re
import resource
import sys
import time
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from experiments import build, films
from experiments.cli import for_people
from experiments.config import Config, GenerateConfig, load
from experiments.films import Request
from lightning_modules.media import FORMATS, presented, read_note, to_uint8, write, write_picture
from models.cascade import Film, MakeAVideo, OnStep

NETWORKS = {"decoder": "D^t", "interpolation": "upF", "sr_low": "SR_l^t", "sr_high": "SR_h"}
KEYS = {f.name for of in (Request, GenerateConfig, Config) for f in fields(of)}
NAMES = {"decoded": "D^t", "interpolated": "upF", "low": "SR_l^t", "high": "SR_h"}


def progress() -> OnStep:
    """A bar for each stage of sampling, with the time left."""
    bar: tqdm[None] | None = None

    def on_step(name: str, calls: int, total: int) -> None:
        nonlocal bar
        if calls == 1 or bar is None:
            bar = tqdm(total=total, desc=f"sampling {name}", file=sys.stderr)
        bar.update(calls - bar.n)
        if calls == total:
            bar.close()

    return on_step


def make_cascade(config: Config, on_step: OnStep | None = None) -> MakeAVideo:
    """The trained cascade of a size; without `on_step`, with a progress bar for each stage of sampling."""
    mixed = build.precision(config.decoder.trainer.precision).startswith("bf16")
    return build.cascade(config, build.device(), torch.bfloat16 if mixed else torch.float32, on_step or progress())


def generate(
    config: Config, prompt: str, seed: int | None = None, maker: MakeAVideo | None = None
) -> tuple[Path, Path]:
    """Make one film for a sentence; as `film`."""
    return film(config, Request(prompt=prompt, seed=config.seed if seed is None else seed), maker)


def film(config: Config, request: Request, maker: MakeAVideo | None = None) -> tuple[Path, Path]:
    """Make one film.

    Returns:
        Paths of the film, in the first of the formats, and of the contact sheet.

    Raises:
        ValueError: the request cannot be met; an input that cannot be read; an unknown format.
        FileNotFoundError: an input is not there, or a stage has not been trained.
    """
    check_formats(config)
    maker = maker or make_cascade(config)
    if maker.clip.truncated(request.prompt):
        warnings.warn(
            f"the prompt has more tokens than CLIP reads ({config.clip.model.context_length}); the end is ignored.",
            stacklevel=2,
        )
    made = films.make(config, request, maker)
    return write_film(config, made, request, films.note(config, request, maker))


def check_formats(config: Config) -> None:
    """Raises ValueError, before anything is computed, for formats that there are not."""
    unknown = [form for form in config.generate.formats if form not in FORMATS]
    if unknown or not config.generate.formats:
        raise ValueError(f"generate.formats is {config.generate.formats}: name one or more of {', '.join(FORMATS)}.")


def write_film(config: Config, made: Film, request: Request, note: dict[str, Any]) -> tuple[Path, Path]:
    """The film's files in `<runs>/<size>/films`: every format, a smaller copy of a large film, the contact sheet."""
    folder = build.run_folder(config, "films")
    folder.mkdir(parents=True, exist_ok=True)
    name = film_name(request, note)
    clip, fps = made.last()
    frames, side = clip[0].float().cpu(), config.generate.presentation
    paths = [write(folder / name, frames, fps, form, note) for form in config.generate.formats]
    if side and clip.shape[-1] > side:
        smaller = presented(frames, side)
        for form in config.generate.formats:
            write(folder / f"{name}-{side}px", smaller, fps, form, note)
    sheet = folder / f"{name}.png"
    write_picture(sheet, contact_sheet(made, request.title()), note)
    return paths[0], sheet


def film_name(request: Request, note: dict[str, Any]) -> str:
    """`<words of the title>-<seed>-<digest of the note>`: letters of any script, and no two films have one name."""
    words = re.sub(r"[\W_]+", "-", request.title().lower()).strip("-")[:60]
    words = words.encode()[:150].decode(errors="ignore").strip("-") or "film"  # names of files have 255 bytes at most
    return f"{words}-{request.seed}-{films.note_digest(note)}"


def contact_sheet(film: Film, title: str, columns: int = 8, side: int = 160) -> Image.Image:
    """A row for each stage: the same moments of the film in the decoder's frames, upF's, SR_l's and SR_h's.

    Frames are enlarged without smoothing, so that each shows its own pixels. The rows after the first begin
    between two of the decoder's frames, to show what interpolation made.
    """
    rows: list[tuple[str, Tensor, float]] = [
        (NAMES[name], clip, film.decoded_fps if name == "decoded" else film.fps) for name, clip in film.clips().items()
    ]
    margin = 18
    sheet = Image.new("RGB", (columns * side, (side + margin) * len(rows) + margin), "white")
    draw = ImageDraw.Draw(sheet)
    shown = "".join(c if c.isprintable() else " " for c in title.encode("utf-8", "replace").decode())
    draw.text((4, 3), f'"{shown}"' if len(shown) <= 200 else f'"{shown[:200]} ..."', fill="black")
    for i, (name, clip, fps) in enumerate(rows):
        count = clip.shape[2]
        chosen = torch.linspace(0, count - 1, columns).round().long()
        frames = rearrange(clip[0][:, chosen], "c f h w -> f c h w").float().cpu()
        mode = "nearest" if frames.shape[-1] <= side else "bilinear"
        frames = F.interpolate(frames, (side, side), mode=mode)
        strip = to_uint8(rearrange(frames, "f c h w -> c h (f w)"))
        top = margin + i * (side + margin)
        sheet.paste(Image.fromarray(strip), (0, top + margin))
        draw.text(
            (4, top + 3), f"{name}: {count} frames of {clip.shape[-1]} x {clip.shape[-1]}, {fps:g} fps", fill="black"
        )
    return sheet


def film_again(path: Path, overrides: list[str]) -> tuple[tuple[Path, Path], MakeAVideo]:
    """Make a film anew from its note, by the same weights.

    Raises ValueError where the weights are others, an input has changed, or something else is asked of the film.
    """
    inputs = [word.removeprefix("input=") for word in overrides if word.startswith("input=")]
    overrides = [word for word in overrides if not word.startswith("input=")]
    for word in overrides:
        if word.partition("=")[0].removeprefix("generate.") not in ("formats", "presentation", "runs"):
            raise ValueError(f"a film is made again as it was, so '{word}' cannot be asked of it: formats and "
                             "presentation can, and input= names a file that has moved.")  # fmt: skip
    note = read_note(path)
    request, settings, dtype = films.remake(note, str(path), inputs)
    config = load(str(note.get("size", "")), overrides, section="generate")
    config.cascade = settings
    check_formats(config)
    maker = make_cascade(config)
    maker.dtype = dtype
    if maker.digest() != note.get("model"):
        weights = build.weights_path(config, "decoder_video").parent
        where = weights if weights == Path(config.pretrained) else build.run_folder(config, "")
        raise ValueError(f"{path} was made by the model {note.get('model')}; that of {where} is {maker.digest()}, and "
                         "would make another film.")  # fmt: skip
    return film(config, request, maker), maker


def request_of(words: list[str]) -> tuple[Request, list[str]]:
    """What is asked for, and the overrides of the page: the use, its files and sentence, then key=value.

    Without the name of a use it is a sentence.
    """
    use = words[0] if words and words[0] in films.USES else ""
    words = words[1:] if use else words
    use = use or "text"
    files = len(films.USES[use].inputs)
    plain = files + (use in ("text", "edit"))
    for word in words[:plain]:
        begun = re.match(r"([a-z_]+)[a-z_.]*=", word)
        if begun and begun[1] in KEYS and not Path(word).is_file():
            raise ValueError(f"'{word}' stands where {' and '.join(films.USES[use].inputs) or 'the sentence'} should.")
    keys: dict[str, Any] = {f.name: type(f.default) for f in fields(Request)}
    keys = {name: kind for name, kind in keys.items() if name not in ("use", "inputs", "prompt")}
    own: dict[str, Any] = {}
    overrides = []
    for word in words[plain:]:
        key, _, value = word.partition("=")
        if key not in keys:
            overrides.append(word)
            continue
        try:
            own[key] = keys[key](value)
        except ValueError:
            raise ValueError(f"{word}: a number is wanted after {key}=.") from None
    prompt = words[files] if plain > files and len(words) > files else ""
    return Request(use, prompt, inputs=tuple(words[:files]), **own), overrides


def peak_memory() -> float:
    """Largest resident size of this process so far, in GiB."""
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peaks() -> str:
    """The peak of memory, and that of the GPU where there is one."""
    told = f"at most {peak_memory():.1f} GiB"
    if torch.cuda.is_available():
        told += f" and {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the GPU"
    return told


@for_people
def main(arguments: list[str]) -> None:
    try:
        run(arguments)
    except KeyboardInterrupt:
        sys.exit("interrupted: this film was not written; what was there stays.")


def run(arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise ValueError('usage: python -m experiments.generate SIZE "a sentence" [key=value ...]')
    start = time.time()
    if arguments[0] == "again":
        (path, sheet), maker = film_again(Path(arguments[1]), arguments[2:])
    else:
        request, overrides = request_of(arguments[1:])
        config = load(arguments[0], overrides, section="generate")
        check_formats(config)
        maker = make_cascade(config)
        path, sheet = film(config, request, maker)
    frames = ", ".join(f"{NETWORKS[name]} {n}" for name, n in maker.most_frames.items())
    print(f"{path}\n{sheet}\nin {time.time() - start:.0f} s and {peaks()}; "
          f"frames at a time: {frames}")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])

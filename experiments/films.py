"""What films are asked for and how they are made: the uses by name, their input files, and the note of a film.

maker = make_cascade(config)                                   # experiments.generate
request = Request("animate", inputs=("fox.png",), seed=3)
film = make(config, request, maker)                            # models.cascade.Film, a batch of one
files = write_film(config, film, request, note(config, request, maker))   # experiments.generate
again, settings, dtype = remake(read_note(files[0]), str(files[0]))
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from datamodules.clips import Video, open_video
from datamodules.image_text import decode
from datamodules.pixels import square
from experiments.config import Config
from models import uses
from models.cascade import Film, MakeAVideo
from models.sampling import CascadeConfig
from models.stages import check_stop

LARGEST_FILE = 500 * 2**20  # bytes of a picture or a video
MOST_FRAMES = 64  # of a video that is extended, all of which are in the film
KEPT_FRAMES = 16  # of a video whose content is varied
FORMAT = 1  # of the note
SLOWEST = 0.1  # frames a second of a video that is extended
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Request:
    """What is asked for. With the page's settings and the weights it is all that a film depends on.

    Raises ValueError for what cannot be.
    """

    use: str = "text"  # one of USES
    prompt: str = ""  # of text; of edit, what the picture should become
    seed: int = 0
    inputs: tuple[str, ...] = ()  # paths: a picture (animate, edit), two (between), a video (extend, vary)
    before: str = "a photo"  # edit: what the picture shows
    weight: float = -1.0  # of slerp; -1 = the use's own, 0.5 between two pictures and 0.35 in an edit
    forward: int = 1  # extend: how often, by a little more than half of the decoder's frames
    backward: int = 0
    stop: str = ""  # decoded | interpolated | low | high; empty = the stage that makes generate.size_out

    def __post_init__(self) -> None:
        if self.use not in USES:
            raise ValueError(f"there is no use '{self.use}': it is one of {', '.join(USES)}.")
        if self.stop:
            check_stop(self.stop)
        wanted = USES[self.use].inputs
        if len(self.inputs) != len(wanted):
            names = " and ".join(wanted) or "no file"
            raise ValueError(f"{self.use} takes {names}, not {len(self.inputs)} files.")
        if self.use in ("text", "edit") and not self.prompt.strip():
            raise ValueError('the prompt is empty: say what the film should show, as in PROMPT="a 3D emoji of a ram".')
        if not 0 <= self.seed < 2**48:
            raise ValueError(f"the seed is a whole number from 0 to 2^48 - 1, not {self.seed}.")

    def title(self) -> str:
        """What the film is of, for its name and its contact sheet."""
        shown = [Path(path).stem for path in self.inputs]
        return " ".join(part for part in (*([] if self.use == "text" else [self.use]), *shown, self.prompt) if part)


def make(config: Config, request: Request, maker: MakeAVideo) -> Film:
    """The film of a request, a batch of one.

    Raises:
        ValueError: an input that cannot be read, or does not fit the use; the message is for people.
        FileNotFoundError: no such input.
    """
    return USES[request.use].make(maker, settled(config, request))


def settled(config: Config, request: Request) -> Request:
    """The request with the stage that its film ends with."""
    return request if request.stop else replace(request, stop=last_stage(config))


def sides(config: Config) -> dict[int, str]:
    """The sides in pixels that films can have -> the stage that they end with."""
    return {config.decoder.size: "interpolated", config.sr_low.size: "low", config.sr_high.size: "high"}


def last_stage(config: Config) -> str:
    """The stage that makes generate.size_out. ValueError where none does."""
    side, known = config.generate.size_out or config.sr_high.size, sides(config)
    if side not in known:
        raise ValueError(f"no stage makes films of {side} pixels: SIZE_OUT is one of {', '.join(map(str, known))}.")
    return known[side]


def of_text(maker: MakeAVideo, request: Request) -> Film:
    return maker.text_to_video([request.prompt], [request.seed], request.stop)


def of_picture(maker: MakeAVideo, request: Request) -> Film:
    return uses.animate(maker, picture(request.inputs[0], maker), [request.seed], request.stop)


def of_two_pictures(maker: MakeAVideo, request: Request) -> Film:
    first, last = (picture(path, maker) for path in request.inputs)
    weight = 0.5 if request.weight == -1 else request.weight
    return uses.between(maker, first, last, [request.seed], weight, request.stop)


def of_longer(maker: MakeAVideo, request: Request) -> Film:
    if min(request.forward, request.backward) < 0 or not request.forward + request.backward:
        raise ValueError("say how often the film is extended: FORWARD=2, BACKWARD=1 or both.")
    clip, fps = film_frames(request, maker)
    return uses.extend(maker, clip, fps, [request.seed], request.forward, request.backward, request.stop)


def of_video(maker: MakeAVideo, request: Request) -> Film:
    path = request.inputs[0]
    video = opened(path)
    chosen = np.unique(np.linspace(0, len(video.times) - 1, KEPT_FRAMES).round().astype(int))
    return uses.vary(maker, squares(path, video, chosen, maker), [request.seed], request.stop)


def of_edited_picture(maker: MakeAVideo, request: Request) -> Film:
    found = uses.picture_embedding(maker, picture(request.inputs[0], maker))
    weight = 0.35 if request.weight == -1 else request.weight
    moved = uses.edit(maker, found, request.before, request.prompt, weight)
    return uses.from_embedding(maker, moved, [request.seed], request.stop)


@dataclass(frozen=True)
class Use:
    """A use: the files it takes, and what makes its film."""

    inputs: tuple[str, ...]
    make: Callable[[MakeAVideo, Request], Film]


USES = {
    "text": Use((), of_text),
    "animate": Use(("a picture",), of_picture),
    "between": Use(("a first picture", "a last one"), of_two_pictures),
    "extend": Use(("a video",), of_longer),
    "vary": Use(("a video",), of_video),
    "edit": Use(("a picture",), of_edited_picture),
}


def picture(path: str, maker: MakeAVideo) -> Tensor:
    """The centre square of a picture, uint8 `1 3 s s`, as large as CLIP and the decoder need."""
    try:
        return decode(content(path), max(maker.clip.image_size, maker.decoder.size))[None]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; give a JPEG, PNG or WebP of at most 50 megapixels.") from None


def film_frames(request: Request, maker: MakeAVideo) -> tuple[Tensor, float]:
    """Frames of the video to be extended at about the decoder's rate, uint8 `1 3 f s s`, and the rate achieved.

    The last `MOST_FRAMES` of a longer one, or the first where it is extended backward alone.
    """
    path = request.inputs[0]
    video = opened(path)
    times = video.times
    rate = min(maker.config.fps, (len(times) - 1) / times[-1])
    if rate < SLOWEST:
        raise ValueError(f"{path} has a frame in {1 / rate:.0f} seconds: at least one in {1 / SLOWEST:.0f} is needed.")
    n = int(times[-1] * rate + 1e-3) + 1
    if n > MOST_FRAMES and request.forward and request.backward:
        raise ValueError(f"{path} is too long to be extended both ways: {n} frames at {rate:g} per second, at most "
                         f"{MOST_FRAMES}. Extend it one way at a time.")  # fmt: skip
    n = min(n, MOST_FRAMES)
    stamps = np.arange(n) / rate if not request.forward else times[-1] - np.arange(n)[::-1] / rate
    indices = np.unique(np.abs(times[None] - stamps[:, None]).argmin(1))
    if len(indices) > 1:
        rate = (len(indices) - 1) / (times[indices[-1]] - times[indices[0]])
    return squares(path, video, indices, maker), float(rate)


def opened(path: str) -> Video:
    """A video that can be read, of two frames or more."""
    content_size(path)
    try:
        return open_video(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; give an mp4 or webm of two frames or more, or a picture to `make animate`."
                         ) from None  # fmt: skip


def squares(path: str, video: Video, indices: np.ndarray, maker: MakeAVideo) -> Tensor:
    """The centre squares of a video's frames, uint8 `1 3 f s s`, as large as CLIP and the decoder need."""
    try:
        frames = square(video.frames(indices), max(maker.clip.image_size, maker.decoder.size))
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from None
    return frames.transpose(0, 1)[None]


def content(path: str) -> bytes:
    """A file's bytes."""
    content_size(path)
    return Path(path).read_bytes()


def content_size(path: str) -> None:
    """Raises for what is no file, empty, or too large to be read."""
    if not path.strip():
        raise ValueError("no file was named: say which, as in IMAGE=fox.png or VIDEO=fox.mp4.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if not 0 < Path(path).stat().st_size <= LARGEST_FILE:
        raise ValueError(f"{path} is empty, or larger than {LARGEST_FILE // 2**20} MiB.")


def note(config: Config, request: Request, maker: MakeAVideo, uploaded: bool = False) -> dict[str, Any]:
    """What makes the film again, with the weights and the inputs: the request, digests of both, and the settings.

    Args:
        uploaded: the inputs are copies that will be deleted, of which the names alone are noted.
    """
    settings, request = asdict(maker.config.resolved()), settled(config, request)
    paths = [Path(path).name if uploaded else os.path.abspath(path) for path in request.inputs]
    return {
        "make-a-video": FORMAT,
        **{**asdict(request), "inputs": paths},
        "inputs_sha256": [sha256(path) for path in request.inputs],
        "uploaded": uploaded,
        "size": config.page,
        "model": maker.digest(),
        "config": settings_digest(settings),
        "dtype": str(maker.dtype).removeprefix("torch."),
        "cascade": settings,
    }


def sha256(path: str) -> str:
    """The SHA-256 of a file's bytes."""
    return hashlib.sha256(content(path)).hexdigest()


def note_digest(found: dict[str, Any]) -> str:
    """Six hex digits of all that a film depends on, which tell apart films of one name."""
    kept = {key: value for key, value in found.items() if key not in ("inputs", "uploaded", "size")}  # where things lie
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:6]


def settings_digest(settings: dict[str, Any]) -> str:
    """Eight hex digits of the settings of sampling."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def remake(found: dict[str, Any], where: str, inputs: Sequence[str] = ()) -> tuple[Request, CascadeConfig, torch.dtype]:
    """The request, settings and precision of a film's note.

    Args:
        inputs: where files that it was made of are now; they are known by their SHA-256.

    Raises ValueError for a note of another kind, or damaged, and for inputs that have changed or moved since.
    """
    if found.get("make-a-video") != FORMAT:
        raise ValueError(f"{where} does not say how it was made: it is not a film of ours, or its note was stripped.")
    try:
        values = {f.name: found[f.name] for f in fields(Request)}
        for f in fields(Request):
            kind = type(f.default)
            if not isinstance(values[f.name], list if kind is tuple else (int, float) if kind is float else kind):
                raise TypeError(f"{f.name} is {values[f.name]!r}")
        paths, digests = list(found["inputs"]), list(found["inputs_sha256"])
        if len(paths) != len(digests) or not all(isinstance(value, str) for value in (*paths, *digests)):
            raise TypeError("inputs have no digests")
        cascade, dtype = OmegaConf.create(found["cascade"]), DTYPES[found["dtype"]]
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(CascadeConfig), cascade))
    except (KeyError, TypeError, AttributeError, OmegaConfBaseException, YAMLError) as error:
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the note of {where} is of another version, or damaged ({told}).") from None
    assert isinstance(config, CascadeConfig)
    if settings_digest(asdict(config.resolved())) != found.get("config"):
        raise ValueError(f"the note of {where} is damaged: its settings are not those of its digest.")
    request = Request(**{**values, "inputs": tuple(paths)})
    for path in inputs:
        if (digest := sha256(path)) not in digests:
            raise ValueError(f"{path} is not what {where} was made of: its SHA-256 is another.")
        paths = [path if digest == known else old for old, known in zip(paths, digests, strict=True)]
    for path, digest in zip(paths, digests, strict=True):
        if not Path(path).is_file():
            key = "VIDEO=" if request.use in ("extend", "vary") else "IMAGE= or TO=" if len(paths) > 1 else "IMAGE="
            gone = "was uploaded to the page, which keeps no uploads" if found.get("uploaded") else "has moved"
            raise FileNotFoundError(f"{Path(path).name} {gone}: name it with {key}.")
        if sha256(path) != digest:
            raise ValueError(f"{path} has changed since {where} was made of it.")
    return replace(request, inputs=tuple(paths)), config, dtype

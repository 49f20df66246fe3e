"""Pictures and clips as files, with a note on how they were made."""

import json
import shutil
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.whole import whole

Note = Mapping[str, Any]

FORMATS = ("mp4", "webm", "gif", "webp", "png")  # png: a folder of frames
KEY = "make-a-video"  # of the note in a PNG
GIF_FPS = 50


def strip(pictures: Tensor) -> Tensor:
    """One row of images `3 h w*n`; of clips `b c f h w`, eight frames of the first two of them."""
    if pictures.ndim == 5 and pictures.shape[2] > 1:
        chosen = torch.linspace(0, pictures.shape[2] - 1, 8).round().long()
        return torch.cat([rearrange(clip[:, chosen], "c f h w -> c h (f w)") for clip in pictures[:2]], dim=1)
    if pictures.ndim == 5:
        pictures = pictures.squeeze(2)
    return rearrange(pictures, "b c h w -> c h (b w)")


def as_bytes(pixels: Tensor) -> Tensor:
    """[-1, 1] to uint8, of any shape."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_uint8(picture: Tensor) -> np.ndarray:
    """[-1, 1] `3 ... h w` to uint8 `... h w 3`."""
    return np.ascontiguousarray(as_bytes(picture).cpu().movedim(0, -1).numpy())


def presented(clip: Tensor, side: int) -> Tensor:
    """A clip `3 f h w` at another side (bicubic, antialiased), as the paper shows its 768 pixels at 512."""
    frames = [F.interpolate(frame[None], (side, side), mode="bicubic", antialias=True)[0] for frame in clip.unbind(1)]
    return torch.stack(frames, dim=1).clamp(-1, 1)


def write_png(path: Path, picture: Tensor) -> None:
    """Write an image `3 h w` in [-1, 1]."""
    Image.fromarray(to_uint8(picture)).save(path)


def write_picture(path: Path, picture: Image.Image, note: Note | None = None) -> None:
    """Write a picture as PNG, whole or not at all, with the note as a text in it."""
    text = PngInfo()
    if note is not None:
        text.add_itxt(KEY, json.dumps(note))
    with whole(path) as part:
        picture.save(part, format="PNG", pnginfo=text)


def write_mp4(path: Path, clip: Tensor, fps: float, note: Note | None = None) -> None:
    """Write a clip `3 f h w` in [-1, 1] as h264; odd sides are cut by a pixel, as yuv420p needs even ones."""
    encode(path, to_uint8(clip), fps, note, "mp4", "libx264", {"crf": "16", "preset": "medium"})


def write_webm(path: Path, clip: Tensor, fps: float, note: Note | None = None) -> None:
    """As `write_mp4`, as VP9."""
    encode(path, to_uint8(clip), fps, note, "webm", "libvpx-vp9", {"crf": "20", "b": "0", "row-mt": "1"})


def encode(
    path: Path, frames: np.ndarray, fps: float, note: Note | None, form: str, codec: str, options: dict[str, str]
) -> None:
    """uint8 frames `f h w 3` as a video file; the note is its comment."""
    frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
    with whole(path) as part, av.open(str(part), "w", format=form) as container:
        if note is not None:
            container.metadata["comment"] = json.dumps(note)
        rate = Fraction(fps).limit_denominator(1001)
        video: Any = container.add_stream(codec, rate=rate, options=options)
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(video.encode(picture))
        container.mux(video.encode())


def write_gif(path: Path, clip: Tensor, fps: float, note: Note | None = None) -> None:
    """Write a clip as a GIF that repeats: 256 colours for all frames, hundredths of a second for each.

    Programs show a frame for two of them at least: of a film above 50 fps frames are left out, which keeps its time.
    """
    frames = to_uint8(clip)
    if fps > GIF_FPS:
        n = max(1, round(len(frames) * GIF_FPS / fps))
        frames, fps = frames[np.arange(n) * len(frames) // n], n * fps / len(frames)
    some = frames[:: max(1, len(frames) // 16)]
    palette = Image.fromarray(np.concatenate(some)).quantize(256)
    pictures = [
        Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames
    ]
    comment = {} if note is None else {"comment": json.dumps(note).encode()}
    with whole(path) as part:
        pictures[0].save(part, format="GIF", save_all=True, append_images=pictures[1:], loop=0, disposal=1,
                         duration=shown(len(pictures), fps, 10), **comment)  # fmt: skip


def write_webp(path: Path, clip: Tensor, fps: float, note: Note | None = None) -> None:
    """Write a clip as an animated WebP that repeats."""
    pictures = [Image.fromarray(frame) for frame in to_uint8(clip)]
    xmp = {} if note is None else {"xmp": json.dumps(note).encode()}
    with whole(path) as part:
        pictures[0].save(part, format="WEBP", save_all=True, append_images=pictures[1:], loop=0, quality=90, method=2,
                         duration=shown(len(pictures), fps, 1), **xmp)  # fmt: skip


def write_frames(folder: Path, clip: Tensor, fps: float, note: Note | None = None) -> None:
    """Write each frame as `folder/0000.png`, without loss, and all of them or none; an older folder is replaced."""
    part, old = (folder.with_name(folder.name + suffix) for suffix in (".part", ".old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for i, frame in enumerate(to_uint8(clip)):
            write_picture(part / f"{i:04d}.png", Image.fromarray(frame), note)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def shown(frames: int, fps: float, unit: int) -> list[int]:
    """For how many milliseconds each frame is shown, in multiples of a format's unit that add up to the film's time."""
    ends = [round((i + 1) * 1000 / fps / unit) * unit for i in range(frames)]
    return [max(unit, end - start) for start, end in zip([0, *ends], ends, strict=False)]


WRITERS = {"mp4": write_mp4, "webm": write_webm, "gif": write_gif, "webp": write_webp, "png": write_frames}


def write(path: Path, clip: Tensor, fps: float, form: str, note: Note | None = None) -> Path:
    """Write a clip `3 f h w` in [-1, 1] in one of `FORMATS`; returns the path with its suffix (none for png).

    Raises ValueError for a format that there is not.
    """
    if form not in WRITERS:
        raise ValueError(f"there is no format '{form}': it is one of {', '.join(FORMATS)}.")
    path = path.with_name(path.name + ("" if form == "png" else f".{form}"))
    WRITERS[form](path, clip, fps, note)
    return path


def read_note(path: Path) -> dict[str, Any]:
    """The note that a film carries: a file of any of the formats, a folder of frames, or one of its PNGs.

    Raises FileNotFoundError, and ValueError where there is none.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no film at {path}.")
    try:
        if path.is_dir():
            path = min(path.glob("*.png"))
        if path.suffix in (".gif", ".webp", ".png"):
            with Image.open(path, formats=("GIF", "WEBP", "PNG")) as image:
                text = image.info.get("comment") or image.info.get("xmp") or image.info.get(KEY) or ""
        else:
            with av.open(str(path), metadata_errors="ignore") as container:
                tags = {key.lower(): value for key, value in container.metadata.items()}
            text = tags.get("comment", "")
        note = json.loads(text)
    except Exception:
        note = None
    if not isinstance(note, dict):
        raise ValueError(f"{path} does not say how it was made: it is not a film of ours, or its note was stripped.")
    return note

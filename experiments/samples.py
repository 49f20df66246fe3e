"""Films on disk with their sentences: what the pages that show films read a folder with."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import av
from av.bitstream import BitStreamFilterContext

KINDS = (".mp4", ".webm")
CODECS, FORMATS = ("h264", "vp8", "vp9", "av1"), ("yuv420p", "yuvj420p")  # what browsers play: not RGB, in which
# the clips of a benchmark are kept
PROMPTS = Path(__file__).with_name("prompts.csv")  # our 100 sentences, 20 in each of the paper's five classes


@dataclass(frozen=True)
class Sample:
    """A film in a file and the sentence that it was made from."""

    path: Path
    prompt: str
    size: tuple[int, int]  # width, height
    seconds: float
    plays: bool  # in a browser, as it is
    codec: str = ""


def read_prompts(path: Path) -> dict[str, str]:
    """The sentences of a CSV file in DrawBench's form, columns Prompts and Category: sentence -> class, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no column Prompts, or no sentence.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of prompts {path}: it is a CSV file with columns Prompts,Category.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        if "Prompts" not in (rows.fieldnames or []):
            raise ValueError(f"{path} has no column Prompts: its first line should be Prompts,Category.")
        found: dict[str, str] = {}
        for row in rows:
            if prompt := (row["Prompts"] or "").strip():
                found.setdefault(prompt, (row.get("Category") or "").strip())
    if not found:
        raise ValueError(f"{path} holds no sentence.")
    return found


def slug(prompt: str) -> str:
    """A sentence as it stands in the name of its film."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "film"


def films_in(folder: Path) -> list[Path]:
    """The films in a folder by name. Raises FileNotFoundError where there is no such folder, or no film in it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} with films.")
    paths = sorted(p for p in folder.iterdir() if p.suffix in KINDS)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no films ({' or '.join(KINDS)}).")
    return paths


def samples(folder: Path, prompts: Iterable[str], most: int = 0) -> list[Sample]:
    """The films in a folder by name, each with its sentence; where there are more than `most`, so many evenly chosen.

    The sentence is the one that `manifest.json` has for the film's number, where generated clips of a benchmark lie, or
    that of the note in the film; without them that of `prompts` whose name the film bears, as
    `<sentence>-<seed>.mp4`; without it the words of the name.

    Raises:
        FileNotFoundError: there is no such folder, or no film in it.
        ValueError: a film cannot be read, or the manifest; several of `prompts` have a film's name.
    """
    paths = films_in(folder)
    if 0 < most < len(paths):
        paths = [paths[round(i * (len(paths) - 1) / max(1, most - 1))] for i in range(most)]
    named: dict[str, list[str]] = {}
    for prompt in dict.fromkeys(prompts):
        named.setdefault(slug(prompt), []).append(prompt)
    numbered = manifest(folder)
    return [read(path, named, numbered.get(path.stem, "")) for path in paths]


def manifest(folder: Path) -> dict[str, str]:
    """Number of a film -> its sentence, in a folder of generated clips; {} in any other."""
    path = folder / "manifest.json"
    if not path.is_file():
        return {}
    try:
        return {f"{k:06d}": str(prompt) for k, prompt in enumerate(json.loads(path.read_text())["prompts"])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: its clips have no sentences without it.") from None


def read(path: Path, named: Mapping[str, list[str]], prompt: str) -> Sample:
    """One film; `named` maps what stands in names to sentences, `prompt` is its own where that is known."""
    try:
        with av.open(str(path)) as file:
            video = file.streams.video[0]
            coded = video.codec_context.codec.canonical_name, video.codec_context.pix_fmt
            size = (video.codec_context.width, video.codec_context.height)
            seconds = (file.duration or 0) / av.time_base
            prompt = prompt or noted(file.metadata.get("comment", ""))
    except (av.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a film ({error}): make it again or take it away.") from None
    words = re.sub(r"-\d+(-[0-9a-f]{6})?$", "", path.stem)
    meant = named.get(slug(words), [])
    if not prompt and len(meant) > 1:
        raise ValueError(f"{path} may be of '{meant[0]}' or of '{meant[1]}': its name does not tell them apart.")
    prompt = prompt or (meant[0] if meant else words.replace("-", " "))
    plays = coded in {(codec, form) for codec in CODECS for form in FORMATS}
    return Sample(path, prompt, size, seconds, plays, coded[0])


def noted(comment: str) -> str:
    """The sentence in the note that films of `make generate` carry; "" where there is none."""
    try:
        return str(json.loads(comment)["prompt"])
    except (ValueError, KeyError, TypeError):
        return ""


def playable(film: Sample, side: int = 0, seconds: float = 0, again: bool = False) -> tuple[bytes, str]:
    """A film as browsers play it, and its kind: the same pictures in a file without metadata, or h264 made of them.

    side: pixels of the longer side that the film is made smaller to, 0 = as it is. seconds: what is taken of one that
    is encoded, 0 = all. again: encode it in any case.
    """
    if film.plays and not again and not 0 < side < max(film.size):
        kind = film.path.suffix.removeprefix(".")
        return copied(str(film.path), kind, film.codec), kind
    share = min(1.0, side / max(film.size)) if side else 1.0
    buffer = io.BytesIO()
    with av.open(str(film.path)) as source, av.open(buffer, "w", "mp4") as target:
        rate = Fraction(source.streams.video[0].average_rate or 24)
        video: Any = target.add_stream("libx264", rate=rate, options={"crf": "12" if share == 1 else "23"})
        video.width, video.height = (max(2, round(pixels * share / 2) * 2) for pixels in film.size)
        video.pix_fmt = "yuv420p"
        most = round(seconds * rate) or None
        for i, frame in enumerate(islice(source.decode(video=0), most)):
            frame = frame.reformat(video.width, video.height, "yuv420p")
            frame.pts, frame.time_base = i, 1 / rate
            target.mux(video.encode(frame))
        target.mux(video.encode())
    buffer.seek(0)
    return copied(buffer, "mp4", "h264"), "mp4"


def copied(film: Any, kind: str, codec: str) -> bytes:
    """The pictures of a film, by path or open file, as they are, in a file that does not tell who made it.

    h264 has notes between its pictures, in which x264 leaves its name and settings: they (SEI, unit 6) are left out.
    """
    buffer = io.BytesIO()
    with av.open(film) as source, av.open(buffer, "w", kind, options={"fflags": "+bitexact"}) as target:
        video = source.streams.video[0]
        copy = target.add_stream_from_template(video)
        clean = BitStreamFilterContext("filter_units=remove_types=6" if codec == "h264" else "null", video, copy)
        packets = (packet for packet in source.demux(video) if packet.dts is not None)
        for packet in chain(packets, [None]):  # the last empties the filter
            for kept in clean.filter(packet):
                kept.stream = copy
                target.mux(kept)
    return buffer.getvalue()

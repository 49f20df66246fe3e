"""Films on disk with their sentences: what the pages that show films read a folder with."""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import av

KINDS = (".mp4", ".webm")  # what browsers play
CODECS = ("h264", "vp8", "vp9", "av1")
PROMPTS = Path(__file__).with_name("prompts.csv")  # our 100 sentences, 20 in each of the paper's five classes


@dataclass(frozen=True)
class Sample:
    """A film in a file and the sentence that it was made from."""

    path: Path
    prompt: str
    size: tuple[int, int]  # width, height
    seconds: float


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


def samples(folder: Path, prompts: Mapping[str, str]) -> list[Sample]:
    """The films in a folder by name, each with its sentence.

    The sentence is the one in the film's own metadata; without it that of `prompts` whose name the film bears, as
    `<sentence>-<seed>.mp4`; without it the words of the name.

    Raises:
        FileNotFoundError: there is no such folder, or no film in it.
        ValueError: a film cannot be read, or is none that a browser plays.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} with films.")
    paths = sorted(p for p in folder.iterdir() if p.suffix in KINDS)
    if not paths:
        raise FileNotFoundError(f"{folder} holds no films ({' or '.join(KINDS)}).")
    named = {slug(prompt): prompt for prompt in prompts}
    return [read(path, named) for path in paths]


def read(path: Path, named: Mapping[str, str]) -> Sample:
    """One film; `named` maps what stands in names to sentences."""
    try:
        with av.open(str(path)) as file:
            video = file.streams.video[0]
            codec = video.codec_context.codec.canonical_name
            size = (video.codec_context.width, video.codec_context.height)
            seconds = (file.duration or 0) / av.time_base
            tagged = file.metadata.get("prompt", "")
    except (av.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a film ({error}): make it again or take it away.") from None
    if codec not in CODECS:
        raise ValueError(f"{path} is {codec}, which browsers do not play: convert it to h264 (ffmpeg -i in out.mp4).")
    words = re.sub(r"-\d+$", "", path.stem)
    return Sample(path, tagged or named.get(slug(words)) or words.replace("-", " "), size, seconds)

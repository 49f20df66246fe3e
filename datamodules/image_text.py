"""Captioned stills from tar shards, as img2dataset writes LAION."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from datamodules import embeddings
from datamodules.pixels import check_sizes, random_crop, square, to_tensor
from datamodules.shards import Sample, StreamDataModule
from datamodules.tars import Entry, expand, index

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("json", "txt")


def decode(data: bytes, resolution: int) -> Image.Image:
    """A picture from its file's bytes as an RGB square; transparency becomes white. Raises ValueError."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; draft takes the smallest that is still
        # enough.
        image.draft("RGB", (resolution, resolution))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return square(image.convert("RGB"), resolution)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image cannot be decoded ({type(error).__name__})") from error


def caption(entry: Entry, rng: np.random.Generator | None) -> str:
    """The caption of a sample, from its .json or else its .txt, and with `rng` half of the time one of the
    json's "alt_captions" instead. Raises ValueError for broken JSON, text that is not UTF-8, no caption.
    """
    meta: dict[str, Any] = {}
    text = ""
    if "txt" in entry.members:
        try:
            text = entry.read("txt").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError("the caption is not UTF-8") from error
    if "json" in entry.members:
        try:
            meta = json.loads(entry.read("json").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError("the json is not UTF-8") from error
        except json.JSONDecodeError as error:
            raise ValueError("the json is not valid JSON") from error
        if not isinstance(meta, dict):
            raise ValueError("the json is not an object")
    main = (_text(meta.get("caption")) or text).strip()
    if not main:
        raise ValueError("the caption is empty")
    listed = meta.get("alt_captions")
    alternatives = [alt for alt in map(_text, listed) if alt] if isinstance(listed, list) else []
    if rng is None or not alternatives or rng.random() < 0.5:
        return main
    return alternatives[int(rng.integers(len(alternatives)))]


def _text(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


@dataclass(frozen=True)
class Pairs:
    """The samples of a list of shards: {"image": uint8 (3, h, w), "text": str, "key": str}.

    With the name of a `clip` come its embeddings, computed beforehand, "image_embedding" and "text_embedding" (d,), of
    the whole picture and the main caption; with resolution 0 no picture is decoded.
    """

    entries: list[Entry]
    resolution: int
    crop: int | None = None
    random_caption: bool = False
    clip: str = ""
    rows: tuple[int, ...] = ()  # of each entry in its shard's file of embeddings

    def __len__(self) -> int:
        return len(self.entries)

    def name(self, index: int) -> str:
        return f"{self.entries[index].shard}:{self.entries[index].key}"

    def load(self, index: int, position: int, rng: np.random.Generator) -> Sample:
        entry = self.entries[index]
        text = caption(entry, rng if self.random_caption else None)
        sample: Sample = {"text": text, "key": entry.key}
        if self.clip:
            sample |= embeddings.read(entry.shard, self.rows[index], self.clip)
        if self.resolution:
            extension = next(extension for extension in IMAGES if extension in entry.members)
            pixels = to_tensor(decode(entry.read(extension), self.resolution))
            sample["image"] = random_crop(pixels, self.crop, rng)
        return sample


def open_pairs(
    shards: Sequence[str], resolution: int, crop: int | None = None, random_caption: bool = False, clip: str = ""
) -> tuple[Pairs, list[tuple[str, str]]]:
    """The samples of shards, whose headers are read, and what was left out as (file or "file:key", cause)."""
    entries, problems = index(shards, (IMAGES, CAPTIONS))
    without = embeddings.missing([shard for shard, _ in groupby(entries, lambda entry: entry.shard)], clip)
    if clip and without:
        raise FileNotFoundError(
            f"{len(without)} shards have no embeddings by {clip}, the first is {without[0]}: "
            "run `make embed` with the same SIZE and data first."
        )
    rows = tuple(embeddings.rows(entries, clip)) if clip else ()
    return Pairs(entries, resolution, crop, random_caption, clip, rows), problems


class ImageTextDataModule(StreamDataModule):
    """Batches {"image": uint8 (b, 3, h, w), "text": list[str], "key": list[str]} from tar shards, endless.

    shards: .tar files, folders, globs or brace ranges. batch_size: samples of one rank. resolution: the
    short side in pixels, before the centre square is cut; crop: side of a random crop of that square, or
    None for all of it. seed: of order, crops and captions. workers: processes that decode; 0 decodes in
    this one. random_caption: draw the caption from the main and the alternative ones, else always the
    main one. clip: name of the CLIP whose embeddings come with each sample (`make embed`), or ""; then the
    caption is the main one, and resolution 0 leaves the pictures out. Raises FileNotFoundError for missing
    shards or embeddings, ValueError where not one sample can be read.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        batch_size: int,
        resolution: int,
        crop: int | None = None,
        seed: int = 0,
        workers: int = 0,
        random_caption: bool = True,
        clip: str = "",
    ) -> None:
        super().__init__(batch_size, seed, workers)
        if resolution or not clip:
            check_sizes(resolution, crop)
        self.shards, self.clip, self.random_caption = shards, clip, random_caption and not clip
        self.resolution, self.crop = resolution, crop
        self._pairs: Pairs | None = None

    def setup(self, stage: str | None = None) -> None:
        """Reads the headers of all shards, once."""
        if self._pairs is None:
            self._pairs, problems = open_pairs(
                expand(self.shards), self.resolution, self.crop, self.random_caption, self.clip
            )
            self.note(problems)

    def source(self) -> Pairs:
        self.setup()
        assert self._pairs is not None
        return self._pairs

    def preview_source(self) -> Pairs:
        return replace(self.source(), random_caption=False)

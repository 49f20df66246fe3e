"""Captioned stills from tar shards, as img2dataset writes LAION."""

import io
import json
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from datamodules import embeddings
from datamodules.filters import FilterConfig, Filters, MissingKeyError
from datamodules.pixels import LARGEST, check_sizes, random_crop, square
from datamodules.remote import local
from datamodules.shards import Sample, StreamDataModule, describe
from datamodules.tars import Entry, expand, index

log = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("json", "txt")
FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow alone goes by the content, and runs Ghostscript for an EPS named .jpg


def decode(data: bytes, resolution: int, crop: int | None = None) -> Tensor:
    """The centre square of a picture from its file's bytes, RGB uint8 (3, s, s), s as of `square`.

    Turned as its EXIF says; transparency becomes white. Raises ValueError, also for more than `LARGEST` pixels.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; draft takes the smallest that is still
        # enough.
        image.draft("RGB", (resolution, resolution))
        if image.width * image.height > LARGEST:
            raise Image.DecompressionBombError
        if "exif" in image.info:
            with suppress(Exception):  # broken EXIF; a broken picture fails below again
                ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # grey of 16 bits, which convert would clip to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except Exception as error:  # of bytes in memory, so it is they that are wrong; readers raise every kind
        raise ValueError(f"the image cannot be decoded ({type(error).__name__})") from error
    return square(pixels[None], resolution, crop)[0]


def metadata(entry: Entry) -> dict[str, Any]:
    """What is known of a sample: its row of a CSV file or its .json, and under "caption" at least its .txt.

    Raises ValueError for broken JSON, text that is not UTF-8, no caption.
    """
    meta: dict[str, Any] = dict(entry.meta or {})
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
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError("the json is not valid JSON") from error
        if not isinstance(meta, dict):
            raise ValueError("the json is not an object")
    meta["caption"] = (_text(meta.get("caption")) or text).strip()
    if not meta["caption"]:
        raise ValueError("the caption is empty")
    return meta


def caption(meta: dict[str, Any], rng: np.random.Generator | None) -> str:
    """The caption of a sample, and with `rng` half of the time one of its "alt_captions" instead."""
    listed = meta.get("alt_captions")
    alternatives = [alt for alt in map(_text, listed) if alt] if isinstance(listed, list) else []
    if rng is None or not alternatives or rng.random() < 0.5:
        return meta["caption"]
    return alternatives[int(rng.integers(len(alternatives)))]


def _text(value: object) -> str:
    # JSON can escape half of a pair of surrogates, which no tokenizer takes.
    return value.encode("utf-8", "replace").decode().strip() if isinstance(value, str) else ""


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
    text: bool = True  # false: captions are not read, and there is no "text"

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def sizes(self) -> list[int]:
        """Samples of each shard; the pictures of a plain folder are one."""
        return [len(list(group)) for _, group in groupby(self.entries, lambda e: e.meta is None and e.shard)]

    @property
    def pixels(self) -> tuple[int, ...]:
        return (3, *[self.crop or self.resolution] * 2) if self.resolution else ()

    def name(self, index: int) -> str:
        return f"{self.entries[index].shard}:{self.entries[index].key}"

    def load(self, index: int, position: int, rng: np.random.Generator) -> Sample:
        entry = self.entries[index]
        sample: Sample = {"key": entry.key}
        if self.text:
            sample["text"] = caption(metadata(entry), rng if self.random_caption else None)
        if self.clip:
            sample |= embeddings.read(entry.shard, self.rows[index], self.clip)
        if self.resolution:
            extension = next(extension for extension in IMAGES if extension in entry.members)
            sample["image"] = random_crop(decode(entry.read(extension), self.resolution, self.crop), self.crop, rng)
        return sample


@dataclass
class Report:
    """What was left out when shards were opened: unreadable as (file or "file:key", cause), and by each filter."""

    problems: list[tuple[str, str]]
    filtered: Counter[str]


def open_pairs(
    shards: Sequence[str],
    resolution: int,
    crop: int | None = None,
    random_caption: bool = False,
    clip: str = "",
    filters: Filters | None = None,
) -> tuple[Pairs, Report]:
    """The samples of shards that pass the filters; read are headers, and metadata where there is a filter.

    Filters act here and not while training, so that the order of samples has no holes: no rank is left without data and
    no neighbour is seen twice. A sample whose metadata cannot be read is left to training, which skips and counts it. A
    shard that cannot be fetched is left out.

    Raises:
        FileNotFoundError: `clip` is named and a shard has no embeddings by it.
        ValueError: not one sample can be read, or the filters take every one.
    """
    entries, problems = index(shards, (IMAGES, CAPTIONS))
    if clip and (listed := next((entry for entry in entries if entry.meta is not None), None)):
        raise ValueError(
            f"{listed.shard} is listed in a CSV file, and embeddings are kept beside tar shards alone: "
            "leave data.embeddings off, or pack the pictures with their captions into tar shards."
        )
    without = embeddings.missing([shard for shard, _ in groupby(entries, lambda entry: entry.shard)], clip)
    if clip and without:
        raise FileNotFoundError(
            f"{len(without)} shards have no embeddings by {clip}, the first is {without[0]}: "
            "run `make embed` with the same SIZE and data first."
        )
    rows = embeddings.rows(entries, clip) if clip else []
    taken: Counter[str] = Counter()
    if filters is not None and filters.active:
        kept, lost = [], dict[str, str]()
        for i, entry in enumerate(entries):
            if entry.shard in lost:
                continue
            try:
                local(entry.shard)
            except (ValueError, OSError) as error:
                lost[entry.shard] = describe(error)
                continue
            try:
                meta = metadata(entry)
            except (ValueError, OSError):
                kept.append(i)
                continue
            try:
                reason = filters.reason(meta, meta["caption"])
            except MissingKeyError as error:
                raise MissingKeyError(f"{entry.shard}:{entry.key}: {error}") from None
            if reason:
                taken[reason] += 1
            else:
                kept.append(i)
        problems += lost.items()
        if not kept:
            fetched = f", {len(lost)} shards could not be fetched" if lost else ""
            raise ValueError(f"The filters took every sample ({dict(taken)}{fetched}); loosen data.filters.")
        entries, rows = [entries[i] for i in kept], [rows[i] for i in kept] if rows else rows
    return Pairs(entries, resolution, crop, random_caption, clip, tuple(rows)), Report(problems, taken)


class ImageTextDataModule(StreamDataModule):
    """Batches {"image": uint8 (b, 3, h, w), "text": list[str], "key": list[str]} from tar shards, endless.

    shards: .tar files at paths or fsspec addresses (s3://, https://), folders, globs or brace ranges; a folder
    may hold a CSV and pictures instead. weights: of each of them in the mixture; none = all are one set.
    batch_size: samples of one rank. resolution: the short side in pixels, before the centre square is cut; crop:
    side of a random crop of that square, or None for all of it; with a crop, smaller pictures are not enlarged.
    seed: of order, crops and captions. workers: processes that decode; 0 decodes in this one. random_caption: draw the
    caption from the main and the alternative ones, else always the main one. clip: name of the CLIP whose embeddings
    come with each sample (`make embed`), or ""; then the caption is the main one, and resolution 0 leaves the pictures
    out. filters: on metadata. text: false leaves captions unread and batches without "text". max_skipped, window,
    changed: as in `StreamDataModule`, with its errors. Raises FileNotFoundError and ValueError as `open_pairs`, too.
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
        weights: Sequence[float] = (),
        filters: FilterConfig | None = None,
        max_skipped: float = 0.5,
        window: int = 0,
        text: bool = True,
        changed: bool = False,
    ) -> None:
        super().__init__(batch_size, seed, workers, max_skipped, window, changed)
        if resolution or not clip:
            check_sizes(resolution, crop)
        shards = [shards] if isinstance(shards, str) else list(shards)
        if weights and len(weights) != len(shards):
            raise ValueError(f"There are {len(weights)} weights of {len(shards)} sources; give one for each.")
        self.groups = [[group] for group in shards] if weights else [shards]
        self.weights = tuple(weights) or (1.0,)
        self.filters = Filters(filters or FilterConfig())
        self.clip, self.random_caption = clip, random_caption and not clip
        self.resolution, self.crop, self.text = resolution, crop, text
        self._pairs: list[Pairs] = []

    def setup(self, stage: str | None = None) -> None:
        """Reads the headers of all shards, once, and with filters the metadata."""
        if self._pairs:
            return
        for group in self.groups:
            pairs, report = open_pairs(
                expand(group), self.resolution, self.crop, self.random_caption, self.clip, self.filters
            )
            used = {entry.shard for entry in pairs.entries}
            self.note_opening(report.problems, used, len(pairs) + report.filtered.total())
            self._pairs.append(replace(pairs, text=self.text))
            self.filtered += report.filtered
        if self.filtered:
            log.info("Filters took %s, %d samples are left.", dict(self.filtered), sum(map(len, self._pairs)))

    def sources(self) -> list[Pairs]:
        self.setup()
        return self._pairs

    def preview_source(self) -> Pairs:
        return replace(self.sources()[0], random_caption=False)

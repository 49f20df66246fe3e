"""What a set of captioned images or of videos holds, before anything is trained on it: a text, and a contact sheet."""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from datamodules.clips import choose_span
from datamodules.filters import FilterConfig, Filters
from datamodules.image_text import CAPTIONS, FORMATS, IMAGES, decode, metadata
from datamodules.pixels import square
from datamodules.shards import describe
from datamodules.tars import Entry, expand, index, scan
from datamodules.video_sources import COLUMNS, VIDEOS, Clip, list_clips, spread

TILE, ACROSS, TILES = 96, 12, 48  # of the contact sheet: side in pixels, columns, most of them
FRAMES, RATES = 16, (1, 6, 30)  # of the clips that videos are checked for; frames per second
NOTE = "Of a clip too short for a rate, training takes frames at a higher one. Filters act on images alone."
COMMON: Any = (("punsafe", 0.1), ("pwatermark", 0.5), ("similarity", 0.28), ("min_side", 64), ("min_side", 256))
SIGNS = {"similarity": "<", "min_side": "<", "toxic_words": "in", "languages": "not in"}  # the others: >


@dataclass
class Facts:
    """What is known of one sample: `numbers` are told by their distribution, `traits` by how many samples have each."""

    numbers: dict[str, float]
    traits: dict[str, bool]
    meta: dict[str, Any]  # what filters ask
    tile: Tensor | None  # for the contact sheet


def inspect(source: str, filters: FilterConfig, output: Path, samples: int = 1000) -> str:
    """What lies at `source`, as text for people, and a contact sheet written to `output`, PNG.

    source: images as `ImageTextDataModule` reads them, or videos as `VideoDataModule` does; a look tells which.
    samples: how many are opened, evenly spread, at least 2. What cannot be read is counted by cause and stops nothing.
    Raises FileNotFoundError where there is nothing, ValueError where nothing can be used or filters make no sense.
    """
    active = Filters(filters).active  # here, so that limits that make no sense are found before all the reading
    videos = holds_videos(source)
    items, left_out = list_clips(source) if videos else index(expand(source), (IMAGES, CAPTIONS))
    facts, unreadable = look(items, samples, of_clip if videos else of_image)
    numbers = {"files with samples": len({origin(item)[1] for item in items}), "samples": len(items),
               "opened, evenly spread": len(facts) + len(unreadable), "readable of these": len(facts)}  # fmt: skip
    parts = [[f"{source}: {origin(items[0])[0]}"], table([(name, f"{n:,}") for name, n in numbers.items()])]
    parts += [causes("left out of the samples", left_out), causes("unreadable of those opened", unreadable)]
    if facts:
        parts += summary(facts)
        parts += [[NOTE] if videos else filtered([fact.meta for fact in facts], filters, active)]
    tiles = [fact.tile for fact in facts if fact.tile is not None]
    if tiles:
        tiles += [torch.full_like(tiles[0], 255)] * (-len(tiles) % ACROSS)
        sheet = rearrange(tiles, "(r c) d h w -> (r h) (c w) d", c=ACROSS)
        Image.fromarray(sheet.numpy()).save(output, "PNG")
    return "\n\n".join("\n".join(part) for part in parts if part) + f"\n\ncontact sheet: {output if tiles else 'none'}"


def holds_videos(source: str) -> bool:
    """Are there videos at `source`, not images? Raises FileNotFoundError for nothing."""
    path = Path(source)
    if path.is_dir() and not [*path.glob("*.tar"), *path.glob("*.csv")]:
        return True
    if path.suffix.lower()[1:] in ("jsonl", *VIDEOS):
        return True
    for shard in expand(source):
        if shard.endswith(".csv"):
            with open(shard, encoding="utf-8-sig", errors="replace") as file:
                return {name.strip('" \n') for name in file.readline().split(",")} >= set(COLUMNS)
        found = {extension for files in scan(shard)[0].values() for extension in files}
        if found & {*VIDEOS, *IMAGES}:
            return bool(found & {*VIDEOS})
    return False  # where there are neither, `index` says what it looked for and why there is none; so does list_clips


def origin(item: Entry | Clip) -> tuple[str, str]:
    """How a sample is listed, and the file it lies in. A video's key has an extension in a plain folder alone."""
    place, what = (item.file, "videos") if isinstance(item, Clip) else (item, "images")
    if isinstance(place, Entry):
        return f"{what} {'in tar shards' if place.meta is None else 'listed in a CSV file'}", place.shard
    return f"videos {'in a folder' if place.endswith(item.key) else 'listed in a file'}", place


def look(items: Sequence[Any], samples: int, read: Callable[[Any, bool], Facts]) -> tuple[list[Facts], list[Any]]:
    """Facts of evenly spread items, some with a tile, and ("file:key", cause) of those that cannot be read."""
    facts, problems = [], []
    chosen = spread(len(items), max(samples, 2))
    shown = {chosen[i] for i in spread(len(chosen), TILES)}
    for i in tqdm(chosen, "inspect", disable=None):
        try:
            facts.append(read(items[i], i in shown))
        except Exception as error:  # as in training: decoders raise every kind of error
            problems.append((f"{origin(items[i])[1]}:{items[i].key}", describe(error)))
    return facts, problems


def of_image(entry: Entry, show: bool) -> Facts:
    """Facts of the header, or with `show` of all. Raises ValueError and OSError for what training would skip."""
    meta = metadata(entry)
    data = entry.read(next(extension for extension in IMAGES if extension in entry.members))
    try:
        width, height = Image.open(io.BytesIO(data), formats=FORMATS).size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image cannot be opened ({type(error).__name__})") from error
    numbers = {"width, px": width, "height, px": height, "width / height": width / height, "file, bytes": len(data),
               "caption, words": len(meta["caption"].split()), "caption, characters": len(meta["caption"])}  # fmt: skip
    has = {str(key): value not in (None, "", []) for key, value in meta.items() if key != "caption"}
    return Facts(numbers, {"alt_captions": False, **has}, meta, decode(data, TILE) if show else None)


def of_clip(clip: Clip, show: bool) -> Facts:
    """Facts of those parts of a video that clips may be taken from. Raises ValueError and OSError."""
    (video, spans), rng = clip.open(), np.random.default_rng(0)
    spans = spans or [(0.0, np.inf)]
    first, end = choose_span(video.times, spans, 2, rng)  # raises where no span has two frames
    cuts: list[np.ndarray] = []
    for span in spans:
        with suppress(ValueError):  # training passes over a span outside the video where there is another
            cuts.append(video.times[slice(*choose_span(video.times, [span], 2, rng))])
    frame = video.frames(np.array([(first + end) // 2 if show else first]))[0]
    usual = float(np.median(gaps := np.diff(video.times)))
    seconds = sum(float(times[-1] - times[0]) + usual for times in cuts)  # the last frame is shown too
    numbers = {"duration, s": seconds, "frames": sum(map(len, cuts)), "frames per second": 1 / float(gaps.mean()),
               "width, px": frame.shape[1], "height, px": frame.shape[0]}  # fmt: skip
    traits = {"variable frame rate": bool(np.ptp(gaps) > max(0.1 * usual, 0.002))}  # some files have whole milliseconds
    for f in (*RATES, np.inf):  # no clip is taken at more than a video's own rate
        name = f"too short for {FRAMES} frames at {f'{f} fps' if f in RATES else 'any rate'}"
        steps = max(min(float(times[-1] - times[0]) * f, len(times) - 1) for times in cuts)
        traits[name] = steps < (FRAMES - 1) * (1 - 1e-3)
    return Facts(numbers, traits, {}, square(frame[None], TILE)[0] if show else None)


def filtered(metas: Sequence[dict[str, Any]], filters: FilterConfig, active: Sequence[str]) -> list[str]:
    """What each filter that is on takes, alone and all together; where none is on, what common limits would take."""
    title = f"filters that are on, missing={filters.missing}" if active else "common limits, no filter is on"
    rows, taken, lacking = [(title, "would take", "share", "lack the key")], set[int](), set[int]()
    for name, limit in [(name, getattr(filters, name)) for name in active] or COMMON:
        one = Filters(replace(FilterConfig(missing="drop"), **{name: limit}))
        said = [one.reason(meta, meta["caption"]) for meta in metas]
        takes, lacks = ({i for i, reason in enumerate(said) if reason == r} for r in (name, f"{name} is missing"))
        if active or len(lacks) < len(metas):
            label = f"{name} {SIGNS.get(name, '>')} {', '.join(limit) if isinstance(limit, list) else limit}"
            rows.append((label, f"{len(takes):,}", f"{len(takes) / len(metas):.1%}", f"{len(lacks):,}"))
            taken, lacking = taken | takes | (lacks if filters.missing == "drop" else set()), lacking | lacks
    lines = table([*rows, ("all together", f"{len(taken):,}", f"{len(taken) / len(metas):.1%}", f"{len(lacking):,}")])
    if active and filters.missing == "error" and lacking:
        keys = ", ".join(sorted({str(key) for meta in metas for key in meta}))
        lines.append(f"With missing=error a sample that lacks a key stops training; keys here are {keys}.")
    return lines if len(rows) > 1 else ["No filter is on, and no sample has what a common one needs."]


def summary(facts: Sequence[Facts]) -> list[list[str]]:
    """Two tables: the distribution of each number, and how many samples have each trait."""
    rows, counts = [["", "min", "5 %", "median", "95 %", "max"]], Counter[str]()
    for name in facts[0].numbers:
        values = np.percentile([fact.numbers[name] for fact in facts], [0, 5, 50, 95, 100])
        rows.append([name, *(f"{v:,.0f}" if v >= 1000 or v % 1 == 0 else f"{v:.4g}" for v in values)])
    for fact in facts:
        counts.update(fact.traits)
    shares = [(name, f"{n:,}", f"{n / len(facts):.1%}") for name, n in counts.most_common()]
    return [table(rows), table([("samples with", "", "share"), *shares])]


def causes(title: str, problems: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each cause, with the first that it befell."""
    counts = Counter(cause for _, cause in problems).most_common()
    examples = {cause: name for name, cause in reversed(problems)}
    return [title, *(f"{n:>7,}  {cause}, as {examples[cause]}" for cause, n in counts)] if problems else []


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in rows]

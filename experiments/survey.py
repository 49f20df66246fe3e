"""What a set of captioned images or of videos holds, before anything is trained on it: `inspect` tells it as text and
writes a contact sheet. What cannot be read is counted by cause, and stops nothing.
"""

import io
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from datamodules.clips import choose_span
from datamodules.filters import FilterConfig, Filters
from datamodules.image_text import CAPTIONS, IMAGES, decode, metadata
from datamodules.pixels import square
from datamodules.shards import describe
from datamodules.tars import Entry, expand, index, scan
from datamodules.video_sources import COLUMNS, VIDEOS, Clip, list_clips, spread

TILE, ACROSS, TILES = 96, 12, 48  # of the contact sheet: side in pixels, columns, most of them
FRAMES, RATES = 16, (1, 6, 30)  # of the clips that videos are checked for; frames per second
COMMON = (("punsafe", 0.1), ("pwatermark", 0.5), ("similarity", 0.28), ("min_side", 64), ("min_side", 256))
SIGNS = {"similarity": "<", "min_side": "<", "toxic_words": "in", "languages": "not in"}  # the others: >


@dataclass
class Facts:
    """What is known of one sample: `numbers` are told by their distribution, `traits` by how many samples have each."""

    numbers: dict[str, float]
    traits: dict[str, bool]
    tile: Image.Image | None  # for the contact sheet
    meta: dict[str, Any] = field(default_factory=dict)  # what filters ask


def inspect(source: str, filters: FilterConfig, output: Path, samples: int = 1000) -> str:
    """What lies at `source`, as text for people, and a contact sheet written to `output`, PNG.

    source: images as `ImageTextDataModule` reads them, or videos as `VideoDataModule` does; a look tells which.
    samples: how many are opened, evenly spread. Of an image only the header is read, but for those on the sheet.
    Raises FileNotFoundError where there is nothing, ValueError where nothing can be used or filters make no sense.
    """
    if samples < 2:
        raise ValueError(f"samples is {samples}; give at least 2.")
    active = Filters(filters).active  # here, so that limits that make no sense are found before all the reading
    videos = holds_videos(source)
    items, left_out = list_clips(source) if videos else index(expand(source), (IMAGES, CAPTIONS))
    facts, unreadable = look(items, samples, of_clip if videos else of_image)
    opened = len(facts) + len(unreadable)
    numbers = {"files with samples": len({origin(item)[1] for item in items}), "samples": len(items),
               "opened, evenly spread": opened, "readable of these": len(facts)}  # fmt: skip
    parts = [[f"{source}: {origin(items[0])[0]}"], table([(name, f"{n:,}") for name, n in numbers.items()])]
    parts += [causes("left out of the samples", left_out), causes(f"unreadable of {opened:,} opened", unreadable)]
    if facts:
        parts += [distributions(facts), shares(facts)]
        parts += [["Filters act on images alone."] if videos else filtered([f.meta for f in facts], filters, active)]
    tiles = [fact.tile for fact in facts if fact.tile]
    sheet = Image.new("RGB", (ACROSS * TILE, -(-len(tiles) // ACROSS) * TILE), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % ACROSS * TILE, i // ACROSS * TILE))
    if tiles:
        sheet.save(output, "PNG")
    parts.append([f"contact sheet: {output}" if tiles else "There is no contact sheet: no sample could be shown."])
    return "\n\n".join("\n".join(part) for part in parts if part)


def holds_videos(source: str) -> bool:
    """Are there videos at `source`, or images? Raises FileNotFoundError for nothing, ValueError for neither."""
    path = Path(source)
    listed = any(next(path.glob(pattern), None) for pattern in ("*.tar", "*.csv"))
    if path.suffix.lower() == ".jsonl" or (path.is_dir() and not listed):
        return True  # where there is no video either, list_clips says what it looked for
    for shard in expand(source):
        if shard.endswith(".csv"):
            with open(shard, encoding="utf-8-sig", errors="replace") as file:
                return {name.strip('" \n') for name in file.readline().split(",")} >= set(COLUMNS)
        members, problem = scan(shard)
        found = {extension for files in members.values() for extension in files}
        if found & {*VIDEOS, *IMAGES}:
            return bool(found & {*VIDEOS})
    raise ValueError(f"{source} holds neither images (KEY.{'/'.join(IMAGES)}) nor videos (KEY.{'/'.join(VIDEOS)}): "
                     f"{problem or 'there are other files alone'}.")  # fmt: skip


def origin(item: Entry | Clip) -> tuple[str, str]:
    """How a sample is listed, and the file that it lies in."""
    place, what = (item.file, "videos") if isinstance(item, Clip) else (item, "images")
    if isinstance(place, Entry):
        return f"{what} {'in tar shards' if place.meta is None else 'listed in a CSV file'}", place.shard
    if isinstance(item, Clip) and item.span:
        return "spans of videos listed in a .jsonl file (HD-VILA)", place
    # In a plain folder a video's key is its path; in a list it is without extension.
    return "videos in a folder" if place.endswith(item.key) else "videos listed in a CSV file (WebVid)", place


def look(items: Sequence[Any], samples: int, read: Callable[[Any, bool], Facts]) -> tuple[list[Facts], list[Any]]:
    """Facts of evenly spread items, some with a tile, and ("file:key", cause) of those that cannot be read."""
    facts, problems = [], []
    chosen = spread(len(items), samples)
    shown = {chosen[i] for i in spread(len(chosen), TILES)}
    for i in tqdm(chosen, "inspect", disable=not sys.stderr.isatty()):
        try:
            facts.append(read(items[i], i in shown))
        except (ValueError, OSError) as error:
            problems.append((f"{origin(items[i])[1]}:{items[i].key}", describe(error)))
    return facts, problems


def of_image(entry: Entry, show: bool) -> Facts:
    """Raises ValueError and OSError for what training would skip."""
    meta = metadata(entry)
    data = entry.read(next(extension for extension in IMAGES if extension in entry.members))
    try:
        width, height = Image.open(io.BytesIO(data)).size
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image cannot be opened ({type(error).__name__})") from error
    words, characters = len(meta["caption"].split()), len(meta["caption"])
    numbers = {"width, px": width, "height, px": height, "width / height": width / height, "file, bytes": len(data),
               "caption, words": words, "caption, characters": characters}  # fmt: skip
    has = {str(key): value not in (None, "", []) for key, value in meta.items() if key != "caption"}
    return Facts(numbers, {"alt_captions": False, **has}, decode(data, TILE) if show else None, meta)


def of_clip(clip: Clip, show: bool) -> Facts:
    """Facts of those parts of a video that clips may be taken from. Raises ValueError and OSError."""
    video, spans = clip.open()
    parts: list[tuple[int, int]] = []
    for span in spans or [(0.0, np.inf)]:
        with suppress(ValueError):  # training passes over a span that lies outside the video, if there is another
            parts.append(choose_span(video.times, [span], 2, np.random.default_rng(0)))
    if not parts:
        raise ValueError("no span in the list has two frames of the video")
    first, end = max(parts, key=lambda part: part[1] - part[0])
    frame = Image.fromarray(video.frames(np.array([(first + end) // 2 if show else first]))[0])
    gaps, cuts = np.diff(video.times), [video.times[a:b] for a, b in parts]
    usual = float(np.median(gaps))
    seconds = sum(float(times[-1] - times[0]) + usual for times in cuts)  # the last frame is shown too
    numbers = {"duration, s": seconds, "frames": sum(map(len, cuts)), "frames per second": 1 / float(gaps.mean()),
               "width, px": frame.width, "height, px": frame.height}  # fmt: skip
    # Files with times in milliseconds have gaps of 33 and of 34 at a constant rate.
    traits = {"variable frame rate": bool(np.ptp(gaps) > max(0.1 * usual, 0.002))}
    for f in (*RATES, np.inf):  # no clip is taken at more than a video's own rate
        name = f"too short for {FRAMES} frames at {f'{f} fps' if f in RATES else 'any rate'}"
        steps = max(min(float(times[-1] - times[0]) * f, len(times) - 1) for times in cuts)
        traits[name] = steps < (FRAMES - 1) * (1 - 1e-3)
    return Facts(numbers, traits, square(frame, TILE) if show else None)


def filtered(metas: Sequence[dict[str, Any]], filters: FilterConfig, active: Sequence[str]) -> list[str]:
    """What each filter that is on takes, alone and all together; where none is on, what common limits would take."""
    title = f"filters that are on, missing={filters.missing}" if active else "common limits, no filter is on"
    rows, taken, lacking = [(title, "would take", "share", "lack the key")], set[int](), set[int]()
    for name, limit in [(name, getattr(filters, name)) for name in active] or COMMON:
        alone: dict[str, Any] = {name: limit}
        one = Filters(replace(FilterConfig(missing="drop"), **alone))
        said = [one.reason(meta, meta["caption"]) for meta in metas]
        takes, lacks = ({i for i, reason in enumerate(said) if reason == r} for r in (name, f"{name} is missing"))
        if active or len(lacks) < len(metas):
            label = f"{name} {SIGNS.get(name, '>')} {', '.join(limit) if isinstance(limit, list) else limit}"
            rows.append((label, f"{len(takes):,}", f"{len(takes) / len(metas):.1%}", f"{len(lacks):,}"))
            taken, lacking = taken | takes, lacking | lacks
    if len(rows) == 1:
        return ["No filter is on, and no sample has what a common one asks (punsafe, pwatermark, similarity, sizes)."]
    if active and filters.missing == "drop":
        taken |= lacking
    lines = table([*rows, ("all together", f"{len(taken):,}", f"{len(taken) / len(metas):.1%}", f"{len(lacking):,}")])
    if active and filters.missing == "error" and lacking:
        keys = ", ".join(sorted({str(key) for meta in metas for key in meta}))
        lines.append(f"With missing=error a sample that lacks a key stops training; keys here are {keys}.")
    return lines


def distributions(facts: Sequence[Facts]) -> list[str]:
    rows = [["", "min", "5 %", "median", "95 %", "max"]]
    for name in facts[0].numbers:
        values = np.percentile([fact.numbers[name] for fact in facts], [0, 5, 50, 95, 100])
        rows.append([name, *(f"{v:,.0f}" if v >= 1000 or v % 1 == 0 else f"{v:.4g}" for v in values)])
    return table(rows)


def shares(facts: Sequence[Facts]) -> list[str]:
    counts = Counter[str]()
    for fact in facts:
        counts.update(fact.traits)
    rows = [(name, f"{n:,}", f"{n / len(facts):.1%}") for name, n in counts.most_common()]
    return table([("samples with", "", "share"), *rows])


def causes(title: str, problems: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each cause, with the first that it befell."""
    examples = {cause: f"   e.g. {name}" for name, cause in reversed(problems)}
    counts = Counter(cause for _, cause in problems).most_common()
    first, *lines = table([(title, ""), *((cause, f"{n:,}") for cause, n in counts)])
    return [first, *(line + examples[cause] for line, (cause, _) in zip(lines, counts, strict=True))] if counts else []


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join((cell.rjust if i else cell.ljust)(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows
    ]

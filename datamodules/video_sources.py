"""Lists of clips, as the usual sets of video come: WebVid's CSV or a plain folder, tar shards of video2dataset, and
HD-VILA's list of spans in long videos. What is at a path says which of them it is.

Read are names, places and times alone. A caption in a CSV, a txt or a json is never kept, so it cannot leak.
"""

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.clips import Span, Video, open_video
from datamodules.tars import Entry, csv_rows, expand, index

VIDEOS = ("mp4", "webm", "mkv", "mov", "avi", "m4v")  # extensions
COLUMNS = ("videoid", "page_dir")  # all that is read of WebVid's CSV; `name` holds the caption
PER_VIDEO = 3  # clips of each HD-VILA video; the paper says three, and not which

Problem = tuple[str, str]  # what was left out, as a file or "file:key", and why


@dataclass(frozen=True, slots=True)
class Clip:
    """A place that a clip may be taken from: a file or a sample in a shard, all of it or a span in it."""

    key: str
    file: str | Entry
    span: Span | None = None

    @property
    def name(self) -> str:
        """ "file:key", for messages."""
        return f"{self.file.shard if isinstance(self.file, Entry) else self.file}:{self.key}"

    def open(self) -> tuple[Video, list[Span] | None]:
        """The video, and the spans of it that a clip must lie in; None for all of it.

        Raises FileNotFoundError, and ValueError for a damaged video or a sample that video2dataset failed at.
        """
        if not isinstance(self.file, Entry):
            return open_video(self.file), [self.span] if self.span else None
        meta = metadata(self.file)
        if why := failure(meta):
            raise ValueError(why)
        video = open_video(self.file.read(extension(self.file)))
        return video, shots(meta, video.times)


def list_clips(root: str | Path) -> tuple[list[Clip], list[Problem]]:
    """The clips at `root` in a fixed order, and what was left out; by what it is:

    - a .csv file, or a folder with one: WebVid, videos page_dir/videoid.mp4 beside it
    - a .jsonl file: HD-VILA, videos video_id.mp4 in the folder `videos` beside it, or beside it
    - a .tar, a glob or a brace range of them, or a folder with some: video2dataset
    - any other folder: all videos in it and below, by name; or one video

    Raises FileNotFoundError where there is nothing, ValueError where nothing can be used.
    """
    path = Path(root)
    suffix = path.suffix.lower()
    if suffix[1:] in VIDEOS and path.is_file():
        return [Clip(path.name, str(path))], []
    if suffix == ".tar" or (not path.exists() and re.search(r"[*?{\[]", str(root))):
        return list_shards(str(root))
    if path.is_file() and suffix in (".csv", ".jsonl"):
        return list_webvid(path) if suffix == ".csv" else list_hdvila(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is no folder {root}; give a folder of videos or of .tar shards, a WebVid .csv or an HD-VILA .jsonl."
        )
    tables = sorted(path.glob("*.csv"))
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise ValueError(f"There are several CSV files in {path} ({names}); name one of them, or leave one.")
    if tables:
        return list_webvid(tables[0])
    if next(path.glob("*.tar"), None):
        return list_shards(str(root))
    return list_folder(path), []


def list_folder(root: Path) -> list[Clip]:
    """All videos in a folder and below, sorted by path, which is their key. Raises FileNotFoundError for none."""
    # A name that begins with a dot is no video, but what macOS writes beside it.
    found = (path for path in root.rglob("[!.]*") if path.suffix[1:].lower() in VIDEOS and path.is_file())
    clips = [Clip(path.relative_to(root).as_posix(), str(path)) for path in sorted(found)]
    if not clips:
        raise FileNotFoundError(
            f"There is no CSV file, no .tar and no video ({', '.join(VIDEOS)}) in {root}; "
            "pictures need a .csv beside them with the columns filename and caption."
        )
    return clips


def list_webvid(table: Path) -> tuple[list[Clip], list[Problem]]:
    """A clip for each row of a WebVid CSV, in its order.

    Raises ValueError for missing columns, and where no row has a video.
    """
    clips: list[Clip] = []
    problems: list[Problem] = []
    # Captions may be in any encoding: they are not read, so they need not be right.
    with table.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv_rows(csv.reader(file))
        header = next(rows, None) or []
        missing = [column for column in COLUMNS if column not in header]
        if missing:
            raise ValueError(
                f"{table} lacks the column {' and '.join(missing)}; WebVid's CSV has both. "
                "A folder without a CSV is read as one of videos."
            )
        video, page = (header.index(column) for column in COLUMNS)
        for number, row in enumerate(rows, 1):
            if row is None or 0 < len(row) <= max(video, page) or (row and not row[video]):
                problems.append((f"{table}:row {number}", "the row of the CSV is damaged"))
            elif row:
                clips.append(Clip(row[video], str(table.parent / row[page] / f"{row[video]}.mp4")))
    if not any(os.path.exists(str(clip.file)) for clip in clips):
        raise ValueError(f"No video listed in {table} is there; expected is page_dir/videoid.mp4 in {table.parent}.")
    return clips, problems


def list_hdvila(table: Path) -> tuple[list[Clip], list[Problem]]:
    """`PER_VIDEO` clips of each video in an HD-VILA list whose file is there, in its order.

    A line is {"video_id": str, "clip": [{"clip_id": str, "span": [start, end]}, ...]}, times as HH:MM:SS.mmm.
    Raises ValueError where no video is there.
    """
    files = {
        entry.name: entry.path
        for folder in (table.parent, table.parent / "videos")
        if folder.is_dir()
        for entry in os.scandir(folder)
    }
    clips: list[Clip] = []
    problems: list[Problem] = []
    with table.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                meta = json.loads(line)
                video, listed = f"{meta['video_id']}.mp4", [(str(c["clip_id"]), c["span"]) for c in meta["clip"]]
            except (ValueError, KeyError, TypeError, RecursionError):
                problems.append((f"{table}:line {number}", "the line of the list is damaged"))
                continue
            if video not in files:
                problems.append((f"{table}:{meta['video_id']}", "the file is missing"))
                continue
            usable: list[Clip] = []
            for key, times in listed:
                try:
                    usable.append(Clip(key, files[video], span(times)))
                except ValueError as error:
                    problems.append((f"{table}:{key}", str(error)))
            clips += [usable[i] for i in spread(len(usable))]
    if not clips:
        raise ValueError(
            f"No clip listed in {table} can be used ({_worst(problems)}); expected is video_id.mp4 "
            f"in {table.parent / 'videos'} or beside the list."
        )
    return clips, problems


def spread(n: int, k: int = PER_VIDEO) -> list[int]:
    """`k` of the indices 0..n-1 at equal distances: for three the first, the middle, the last. All where n <= k."""
    return [i * (n - 1) // (k - 1) for i in range(k)] if n > k else list(range(n))


def list_shards(shards: str) -> tuple[list[Clip], list[Problem]]:
    """A clip for each sample with a video in tar shards, in their order.

    Raises FileNotFoundError where there is no shard, ValueError where no sample has a video.
    """
    entries, problems = index(expand(shards), [(*VIDEOS, "json")])
    problems += [(f"{entry.shard}:{entry.key}", _why_missing(entry)) for entry in entries if not extension(entry)]
    clips = [Clip(entry.key, entry) for entry in entries if extension(entry)]
    if not clips:
        raise ValueError(f"No sample of {shards} has a video ({_worst(problems)}); expected is KEY.mp4 with KEY.json.")
    return clips, problems


def _why_missing(entry: Entry) -> str:
    # Of a remote shard the members' places may be all that is here; the json is not worth fetching it now.
    if os.path.exists(entry.shard):
        try:
            return failure(metadata(entry)) or "the sample has no video"
        except (OSError, ValueError):
            pass
    return "the sample has no video"


def _worst(problems: Sequence[Problem]) -> str:
    causes = Counter(cause for _, cause in problems).most_common(3)
    return "; ".join(f"{n} times: {cause}" for cause, n in causes) or "it is empty"


def extension(entry: Entry) -> str:
    """The extension of a sample's video; "" if it has none."""
    return next((extension for extension in VIDEOS if extension in entry.members), "")


def metadata(entry: Entry) -> dict[str, Any]:
    """The json of a sample; {} if it has none. Raises ValueError for one that is no json object."""
    if "json" not in entry.members:
        return {}
    data = entry.read("json")
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError):
        meta = None
    if not isinstance(meta, dict):
        # Without it nobody knows where the cuts are, so the video is not worth the risk.
        raise ValueError("the sample's json is damaged")
    return meta


def failure(meta: dict[str, Any]) -> str:
    """Why video2dataset says that a sample failed; "" if it does not."""
    said = meta.get("status", "success")
    if said == "success":
        return ""
    # A word and no more: a message must not carry a caption.
    return f"video2dataset: {said if isinstance(said, str) and re.fullmatch('[a-z_]{1,40}', said) else 'failed'}"


def seconds(time: Any) -> float:
    """Seconds of a number, or of HH:MM:SS.mmm. Raises ValueError for anything else."""
    try:
        hours, minutes, rest = time.split(":") if isinstance(time, str) and ":" in time else (0, 0, time)
        value = 3600 * int(hours) + 60 * int(minutes) + float(rest)
    except (ValueError, TypeError, OverflowError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("a time in the list is damaged")
    return value


def span(times: Any) -> Span:
    """[start, end] in seconds. Raises ValueError for what is no such pair."""
    if not isinstance(times, list) or len(times) != 2:
        raise ValueError("a span in the list is damaged")
    start, end = seconds(times[0]), seconds(times[1])
    if start >= end:
        raise ValueError("a span in the list is damaged")
    return start, end


def shots(meta: dict[str, Any], times: np.ndarray) -> list[Span] | None:
    """The parts of a video that no cut divides, by what video2dataset wrote; None where it knows of none.

    times: (n,) seconds from the first frame, rising. Read are {"cuts": {"cuts_original_fps": frame numbers
    [[start, end], ...], "original_fps": float}} and {"clips": [[start, end], ...]}. Where video2dataset cut a clip out
    of a longer video, both still tell of that: "clips" is then one span, which ends after the file does.
    Raises ValueError for what is no pair of times.
    """
    length = float(times[-1])
    clips = [span(pair) for pair in meta.get("clips") or []]
    cut_out = len(clips) == 1 and clips[0][1] > length + 0.5
    cuts = meta.get("cuts") or {}
    numbers = [span(pair) for pair in cuts.get("cuts_original_fps") or []]
    if not numbers:
        return None if cut_out else clips or None
    native = (len(times) - 1) / length
    rate = seconds(cuts.get("original_fps") or native)
    if not cut_out and abs(rate / native - 1) < 0.01:
        # The frames are those that were counted: their own times hold for a variable frame rate too.
        starts = np.append(times, math.inf)
        return [(float(starts[int(min(a, len(times)))]), float(starts[int(min(b, len(times)))])) for a, b in numbers]
    # Half a frame early, so that rounding puts no frame on the wrong side.
    offset = clips[0][0] if cut_out else 0.0
    return [((a - 0.5) / rate - offset, (b - 0.5) / rate - offset) for a, b in numbers]

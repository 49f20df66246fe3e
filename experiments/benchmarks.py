"""What is scored: prompts and real clips, and the paper's two benchmarks, read from their sets as they are distributed.

UCF-101 (arXiv 2209.14792, section 4): one sentence for each class, ours and frozen in `ucf101.csv`, and as many samples
of a class as it has a share of the training set. MSR-VTT: a sample for each caption of the test set.
"""

import csv
import hashlib
import heapq
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.filters import read_names
from datamodules.video_sources import Clip, Problem, list_clips
from experiments.config import Config

SENTENCES = Path(__file__).parent / "ucf101.csv"
COLUMNS = ("prompt", "prompts", "caption", "text", "sentence", "name")  # where a table may have its prompts
UCF101_CLASSES, UCF101_SAMPLES, UCF101_TRAIN = 101, 10_000, 9_537
MSRVTT_CAPTIONS, MSRVTT_VIDEOS = 59_794, 2_990  # of the paper; 20 for each video would be 59,800


@dataclass
class Task:
    """What to generate and what to hold it against."""

    name: str  # of the benchmark, and of the folder of its samples
    prompts: list[str]  # of sample 0, 1, ...
    clips: list[Clip]  # real ones
    real: str  # where they are from, in words
    problems: list[Problem] = field(default_factory=list)  # real clips that are listed and not there
    notes: list[str] = field(default_factory=list)  # where this is not the published protocol
    samples: int = 0  # of the published protocol; 0 = there is none
    beside: dict[str, str] = field(default_factory=dict)  # a prompt's real clip, by path


def folder_task(config: Config, need_prompts: bool = True, need_clips: bool = True) -> Task:
    """Samples of any prompts, against any clips; of the page's own clips those that `data.clips_only` names."""
    settings, root = config.evaluate, config.evaluate.clips or config.data.clips
    listed = config.data.clips_only if root == config.data.clips else ""
    only = read_names(listed) if listed else None
    texts: list[str] = []
    if need_prompts:
        texts = read_prompts(Path(settings.prompts)) if settings.prompts else names(root, settings.prompt, only)
        n = settings.samples or len(texts)
        texts = [texts[i % len(texts)] for i in range(n)]
    if not need_clips:
        return Task("samples", texts, [], "none")
    if not root:
        raise ValueError("there are no real clips to compare with: name a folder or shards, as in evaluate.clips=path.")
    clips, problems = list_clips(root)
    clips = [clip for clip in clips if only is None or clip.key in only]
    return Task("samples", texts, clips, f"{root}, those in {listed}" if listed else root, problems)


def names(root: str, template: str = "{}", only: frozenset[str] | None = None) -> list[str]:
    """Prompts from the names of clips in the CSV of their folder, in its order; of all, or of these keys."""
    found = [row["name"] for row in named_rows(root) if only is None or row.get("videoid") in only]
    if not found:
        raise ValueError(f"none of the clips in '{root}' that have a name is one that data.clips_only lists.")
    return [prompted(template, name) for name in found]


def named_rows(root: str) -> list[dict[str, str]]:
    """The rows with a name in the CSV of a folder of clips, in its order."""
    path = Path(root)
    tables = sorted(path.glob("*.csv")) if path.is_dir() else [path] if path.suffix == ".csv" else []
    if not tables or not tables[0].is_file():
        raise FileNotFoundError(
            f"there is no CSV with the clips' names in '{root}': name clips that have one, or, to make eval-..., "
            "prompts in a file of their own, evaluate.prompts=file."
        )
    with tables[0].open(newline="", encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if row.get("name")]
    if not found:
        raise ValueError(f"{tables[0]} has no names, so there is nothing to prompt with.")
    return found


def prompted(template: str, name: str) -> str:
    """The prompt of a name. Raises ValueError for a template that is none."""
    try:
        return template.format(name)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise ValueError(f"evaluate.prompt='{template}' is no template: {{}} stands for the name, once.") from None


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in its order; empty ones are left out.

    A .csv has them in a column `prompt`, `caption`, `text`, `sentence` or `name` (DrawBench's is `Prompts`); a .json is
    a list of strings or of objects with such a key, a .jsonl one of these a line; in any other file each line is one.
    Raises FileNotFoundError, and ValueError for another layout or no prompt.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of prompts at {path} (evaluate.prompts).")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            found = [pick(row, path) for row in csv.DictReader(io.StringIO(text))]
        elif path.suffix in (".json", ".jsonl"):
            lines = [line for line in text.splitlines() if line.strip()]
            rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in lines]
            if not isinstance(rows, list):
                raise ValueError(f"{path} is no list of prompts: strings, or objects with the key prompt.")
            found = [row if isinstance(row, str) else pick(row, path) for row in rows]
        else:
            found = text.splitlines()
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as prompts: {error}.") from None
    found = [prompt.strip() for prompt in found if prompt.strip()]
    if not found:
        raise ValueError(f"{path} holds no prompt; write one a line.")
    return found


def pick(row: Any, path: Path) -> str:
    """The prompt of a row of a table."""
    lower = {str(key).lower(): value for key, value in row.items()} if isinstance(row, dict) else {}
    for column in COLUMNS:
        if column in lower:
            return str(lower[column] or "")
    raise ValueError(f"{path} has no column of prompts: it is called one of {', '.join(COLUMNS)}.")


def some(clips: Sequence[Clip], n: int, seed: int) -> list[Clip]:
    """`n` of the clips, or all there are, in an order drawn from the seed: more of them begin with the same."""
    order = np.random.default_rng(seed).permutation(len(clips))
    return [clips[i] for i in order[:n]]


def shares(counts: dict[str, int], n: int) -> list[str]:
    """`n` classes in proportion to their counts; the first m of them are those of n = m.

    Each goes to the class with the largest count / (2 * taken + 1), the method of Sainte-Lague.
    """
    queue = [(-float(count), place, name, 0) for place, (name, count) in enumerate(counts.items()) if count]
    heapq.heapify(queue)
    chosen = []
    for _ in range(n):
        _, place, name, taken = queue[0]
        chosen.append(name)
        heapq.heapreplace(queue, (-counts[name] / (2 * taken + 3), place, name, taken + 1))
    return chosen


def ucf101(config: Config) -> Task:
    """UCF-101: `ucf101_samples` of our sentences, against the clips of the first training split, each once."""
    n = config.evaluate.ucf101_samples
    if n < 2:
        raise ValueError(f"evaluate.ucf101_samples={n}: a distance needs at least two samples.")
    clips, counts, problems = read_ucf101(config.evaluate.ucf101)
    sentences = read_sentences()
    if unknown := [name for name in counts if name not in sentences]:
        raise ValueError(f"{SENTENCES.name} has no sentence for the class {unknown[0]} of {config.evaluate.ucf101}.")
    frozen = hashlib.sha256(SENTENCES.read_bytes()).hexdigest()[:12]
    notes = [f"the 101 sentences are ours (SHA-256 {frozen}), as those of the paper are not published"]
    if len(counts) != UCF101_CLASSES:
        notes.append(f"{len(counts)} classes in place of {UCF101_CLASSES}")
    if len(clips) != UCF101_TRAIN:
        notes.append(f"{len(clips):,} clips in the training set in place of {UCF101_TRAIN:,}")
    texts = [sentences[name] for name in shares(counts, n)]
    of_class = {clip.key.split("/")[0]: str(clip.file) for clip in reversed(clips)}
    beside = {sentences[name]: path for name, path in of_class.items()}
    return Task("ucf101", texts, clips, "UCF-101, trainlist01", problems, notes, UCF101_SAMPLES, beside)


def read_sentences() -> dict[str, str]:
    """Our sentence for each class of UCF-101. They are frozen: another one makes other samples."""
    with SENTENCES.open(newline="", encoding="utf-8") as file:
        return {row["class"]: row["sentence"] for row in csv.DictReader(file)}


def read_ucf101(root: str) -> tuple[list[Clip], dict[str, int], list[Problem]]:
    """The clips of the first training split, how many are listed of each class, and what is listed and not there.

    root: holds UCF-101/ClassName/v_ClassName_gXX_cYY.avi, and ucfTrainTestlist/ with classInd.txt ("1 ApplyEyeMakeup")
    and trainlist01.txt ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1").
    Raises FileNotFoundError for a part that is missing, ValueError for a line of another form and a class of no video.
    """
    if not root:
        raise ValueError(
            "name the folder of UCF-101, as in evaluate.ucf101=path; docs/evaluation.md says how to get it."
        )
    videos, lists = Path(root) / "UCF-101", Path(root) / "ucfTrainTestlist"
    for part in (videos, lists / "classInd.txt", lists / "trainlist01.txt"):
        if not part.exists():
            raise FileNotFoundError(f"there is no {part}: evaluate.ucf101 holds UCF-101 and ucfTrainTestlist.")
    lines = [line.split() for line in (lists / "classInd.txt").read_text().splitlines() if line.strip()]
    listed = [line.split()[0] for line in (lists / "trainlist01.txt").read_text().splitlines() if line.strip()]
    whole = lines and listed
    if not whole or any(len(line) != 2 for line in lines) or any(name.count("/") != 1 for name in listed):
        raise ValueError(f"{lists} is not of UCF-101's form: lines '1 Class' and 'Class/v_Class_g01_c01.avi 1'.")
    counts = Counter(name.split("/")[0] for name in listed)
    there = [name for name in listed if (videos / name).is_file()]
    present = {name.split("/")[0] for name in there}
    for _, name in lines:
        if not counts[name] or name not in present:
            what = "is not in trainlist01.txt" if not counts[name] else f"has none of its videos in {videos / name}"
            raise ValueError(f"the class {name} {what}; without it the shares of the classes are others.")
    problems = [(str(videos / name), "the file is missing") for name in sorted(set(listed) - set(there))]
    return [Clip(name, str(videos / name)) for name in there], {name: counts[name] for _, name in lines}, problems


def msrvtt(config: Config) -> Task:
    """MSR-VTT: a sample for each caption, or for one of each video, against the videos, each once."""
    settings = config.evaluate
    if settings.msrvtt_captions not in ("all", "one"):
        raise ValueError(f"evaluate.msrvtt_captions is all or one, not '{settings.msrvtt_captions}'.")
    captions, clips, problems = read_msrvtt(settings.msrvtt, settings.msrvtt_split)
    videos = len({video for video, _ in captions})
    notes = []
    if settings.msrvtt_split != "test":
        notes.append(f"the split {settings.msrvtt_split} in place of test")
    if len(captions) != MSRVTT_CAPTIONS:
        notes.append(f"{len(captions):,} captions in the set, the paper has {MSRVTT_CAPTIONS:,}")
    if videos != MSRVTT_VIDEOS:
        notes.append(f"{videos:,} videos in place of {MSRVTT_VIDEOS:,}")
    n = videos if settings.msrvtt_captions == "one" else len(captions)
    if settings.msrvtt_captions == "one":
        notes.append("one caption of each video in place of all")
    if 0 < settings.msrvtt_samples < n:
        n = settings.msrvtt_samples
        notes.append("the first samples alone")
    texts, files = [text for _, text in captions[:n]], {clip.key: str(clip.file) for clip in clips}
    beside = {text: files[video] for video, text in reversed(captions[:n]) if video in files}
    real = f"MSR-VTT, {settings.msrvtt_split}"
    return Task("msrvtt", texts, clips, real, problems, notes, MSRVTT_CAPTIONS, beside)


def read_msrvtt(root: str, split: str = "test") -> tuple[list[tuple[str, str]], list[Clip], list[Problem]]:
    """Captions of a split as (video, caption), its videos, and what is listed and not there.

    First comes the first caption of every video, by its sen_id, then the second of every video: the beginning of the
    list is one caption for each video. root: holds test_videodatainfo.json or train_val_videodatainfo.json, {"videos":
    [{"video_id", "split"}], "sentences": [{"caption", "video_id", "sen_id"}]}, and the videos, video_id.mp4, in any
    folder (TestVideo/ as distributed). A JSON without sentences, as test_videodatainfo_nosen.json of the set, is left
    out; a sentence that two of them hold counts once. Raises FileNotFoundError, and ValueError for another layout.
    """
    if not root:
        raise ValueError(
            "name the folder of MSR-VTT, as in evaluate.msrvtt=path; docs/evaluation.md says how to get it."
        )
    tables = sorted(Path(root).glob("*_videodatainfo.json")) or sorted(Path(root).glob("*.json"))
    if not tables:
        raise FileNotFoundError(f"there is no test_videodatainfo.json in {root} (evaluate.msrvtt).")
    wanted: dict[str, dict[int, str]] = {}
    for table in tables:
        try:
            meta = json.loads(table.read_text(encoding="utf-8"))
            if len(tables) > 1 and "sentences" not in meta:
                continue
            listed = {str(video["video_id"]) for video in meta["videos"] if video["split"] == split}
            rows = [(str(s["video_id"]), int(s["sen_id"]), str(s["caption"])) for s in meta["sentences"]]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{table} is not of MSR-VTT's layout: videos with video_id and split, sentences with video_id, sen_id "
                "and caption."
            ) from None
        for video, number, caption in rows:
            if video in listed and caption.strip():
                wanted.setdefault(video, {})[number] = caption.strip()
    if not wanted:
        raise ValueError(f"the split '{split}' has no caption in {root}; there are train, validate and test.")
    order = sorted(wanted, key=lambda video: (len(video), video))  # video7010 before video10000
    turns = [sorted(wanted[video].items()) for video in order]
    captions = [(video, turn[k][1]) for k in range(max(map(len, turns)))
                for video, turn in zip(order, turns, strict=True) if k < len(turn)]  # fmt: skip
    files = {path.stem: str(path) for path in sorted(Path(root).rglob("video*.mp4"))}
    clips = [Clip(video, files[video]) for video in order if video in files]
    if not clips:
        raise FileNotFoundError(f"none of the {len(order)} videos of '{split}' is in {root}, as {order[0]}.mp4.")
    return captions, clips, [(f"{root}:{video}", "the file is missing") for video in order if video not in files]

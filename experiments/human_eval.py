"""`python -m experiments.human_eval A B [key=value ...]`: a page on which people compare the films of two folders.

As in the paper: two films of one sentence side by side; first which is of higher quality, without the sentence, then
which fits the sentence better. Five people answer for each pair.

    <out>/page/        give this folder to the raters: index.html works from a disk or from any web server
    <out>/answers/     put the files that raters send back here
    <out>/key.json     which film is whose: keep it

The page knows films by digests alone, and the films in it carry no metadata. Their order and sides are drawn for each
rater by name. `python -m experiments.human_tally <out>` counts.
"""

import hashlib
import json
import re
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.cli import for_people, settings
from experiments.samples import PROMPTS, Sample, playable, read_prompts, samples

QUESTIONS = {"quality": "Which film is of higher quality?", "faithfulness": "Which film fits the text better?"}


@dataclass
class HumanEval:
    """The settings of the command."""

    out: str = "runs/human"
    prompts: str = str(PROMPTS)  # CSV with columns Prompts,Category: sentences and classes of the films
    seed: int = 0  # of ids, and so of order and sides


def pairs(a: list[Sample], b: list[Sample]) -> list[tuple[Sample, Sample]]:
    """Films of the same sentence from two folders: those of one name first, then what is left in order of name."""
    by_prompt: dict[str, tuple[list[Sample], list[Sample]]] = defaultdict(lambda: ([], []))
    for side, films in enumerate((a, b)):
        for film in films:
            by_prompt[film.prompt][side].append(film)
    found = []
    for left, right in by_prompt.values():
        names = {untold(film): film for film in right}
        same = [(film, names[untold(film)]) for film in left if untold(film) in names]
        taken = {film.path for pair in same for film in pair}
        rest = [[film for film in side if film.path not in taken] for side in (left, right)]
        found += [*same, *zip(*rest, strict=False)]
    return found


def untold(film: Sample) -> str:
    """The name of a film without the digest at its end, which is another for every model: sentence and seed."""
    return re.sub(r"(-\d+)-[0-9a-f]{6}$", r"\1", film.path.stem)


def build(folder_a: Path, folder_b: Path, options: HumanEval) -> tuple[Path, list[str]]:
    """Write the page and its key.

    Returns:
        The path of index.html, and what one should know of the comparison, in sentences.

    Raises:
        FileNotFoundError: a folder, or its films, or the file of prompts is missing.
        ValueError: no two films have a sentence in common, the two of a pair are the same film, a film is unreadable,
            or `out` holds answers to another page.
    """
    classes = read_prompts(Path(options.prompts))
    a, b = samples(folder_a, classes), samples(folder_b, classes)
    found = pairs(a, b)
    if not found:
        raise ValueError(
            f"no film in {folder_a} has the sentence of one in {folder_b}, as '{a[0].prompt}' and '{b[0].prompt}': "
            "name them <sentence>-<seed>.mp4 alike, or give prompts=file.csv with the sentences of both."
        )
    key: dict[str, Any] = {"systems": {"A": str(folder_a), "B": str(folder_b)}, "seed": options.seed,
                           "questions": list(QUESTIONS), "pairs": {}}  # fmt: skip
    # All are copied or all are made anew: files of two kinds, or of two encoders, tell A from B.
    again = len({(film.codec, film.path.suffix, film.plays) for pair in found for film in pair}) > 1
    films: dict[str, bytes] = {}
    shown: list[dict[str, Any]] = []
    for pair in found:
        ids = []
        for film in pair:
            data, kind = playable(film, again=again)
            ids.append(f"{digest(options.seed, pair[0].path.stem, data)}.{kind}")
            films[ids[-1]] = data
        if ids[0] == ids[1]:
            raise ValueError(f"{pair[0].path} and {pair[1].path} are the same film: nothing to choose between.")
        prompt, name = pair[0].prompt, digest(options.seed, *sorted(ids))
        shown.append({"id": name, "prompt": prompt, "films": sorted(ids)})
        key["pairs"][name] = {"prompt": prompt, "class": classes.get(prompt, ""), "A": ids[0], "B": ids[1],
                              "names": [film.path.name for film in pair]}  # fmt: skip
    shown.sort(key=lambda pair: pair["id"])
    key["page"] = digest(options.seed, *key["pairs"])
    page = write(Path(options.out), key, shown, films)
    return page, remarks(key, a, b, found)


def digest(seed: int, *parts: str | bytes) -> str:
    """An id that tells nothing to one who does not have all parts."""
    found = hashlib.sha256(str(seed).encode())
    for part in parts:
        found.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return found.hexdigest()[:16]


def write(out: Path, key: dict[str, Any], shown: list[dict[str, Any]], films: dict[str, bytes]) -> Path:
    """The folders of the page, in place of an earlier page that nobody has answered."""
    answers, place = out / "answers", out / "key.json"
    if place.is_file() and json.loads(place.read_text())["page"] != key["page"] and any(answers.glob("*.json")):
        raise ValueError(f"{answers} holds answers to another page: count them first, or give another out=folder.")
    page = out / "page" / "index.html"
    shutil.rmtree(page.parent, ignore_errors=True)
    (page.parent / "films").mkdir(parents=True)
    answers.mkdir(exist_ok=True)
    for name, data in films.items():
        (page.parent / "films" / name).write_bytes(data)
    told = {"page": key["page"], "questions": QUESTIONS, "pairs": shown}
    template = Path(__file__).with_name("human_eval.html").read_text(encoding="utf-8")
    # in a script element "</" ends it
    page.write_text(template.replace("{{data}}", json.dumps(told).replace("<", "\\u003c")), encoding="utf-8")
    place.write_text(json.dumps(key, indent=1))
    return page


def remarks(key: dict[str, Any], a: list[Sample], b: list[Sample], found: list[tuple[Sample, Sample]]) -> list[str]:
    """What makes the comparison other than a reader would think."""
    told = []
    for name, films in (("A", a), ("B", b)):
        if alone := len(films) - len(found):
            told.append(f"{alone} of {len(films)} films of {name} have no partner and are left out.")
    looks = {name: sorted({f"{f.size[0]} x {f.size[1]}, {f.seconds:.1f} s, {f.path.suffix[1:]}" for f in side})
             for name, side in (("A", [p[0] for p in found]), ("B", [p[1] for p in found]))}  # fmt: skip
    if looks["A"] != looks["B"]:
        told.append(f"The films differ in form, A {'; '.join(looks['A'])}, B {'; '.join(looks['B'])}: raters see that.")
    if unknown := sum(not pair["class"] for pair in key["pairs"].values()):
        told.append(f"{unknown} of {len(found)} sentences are not in the file of prompts, so they have no class.")
    return told


@for_people
def main(arguments: list[str]) -> None:
    if len(arguments) < 2 or "" in arguments[:2]:
        raise ValueError("usage: python -m experiments.human_eval A B [key=value ...], two folders of films")
    options = settings(HumanEval, arguments[2:])
    page, told = build(Path(arguments[0]), Path(arguments[1]), options)
    count = len(json.loads((Path(options.out) / "key.json").read_text())["pairs"])
    print(*told, f"{page}: {count} pairs. Give raters the folder {page.parent} and nothing else; put the files they "
          f"send into {Path(options.out) / 'answers'}, then `make human-tally`.", sep="\n")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])

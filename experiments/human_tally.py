"""`python -m experiments.human_tally [OUT]`: what the raters of `make human-eval` prefer.

For each question and pair the majority of its raters counts, five in the paper: of more the five whose files were saved
first. The share of pairs that A wins comes with Wilson's 95 % interval, which holds for few pairs and for shares near 0
and 1, and beside it what the paper says of itself. Written to `<OUT>/tally.json`.
"""

import json
import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.cli import for_people

RATERS = 5  # of a pair, in the paper
# Make-A-Video against others (arXiv 2209.14792): the % of its prompts' pairs preferred for quality, for faithfulness.
PUBLISHED = (
    ("VDM", "28 of VDM's page", 84.38, 78.13),
    ("CogVideo (Chinese)", "DrawBench, 200", 76.88, 73.37),
    ("CogVideo (English)", "DrawBench, 200", 74.48, 68.75),
    ("CogVideo (Chinese)", "own 300", 73.44, 75.74),
    ("CogVideo (English)", "own 300", 77.15, 71.19),
)
Votes = dict[tuple[str, str], dict[str, str]]
"""(question, pair) -> rater -> "A" or "B"."""


@dataclass
class Count:
    """The pairs of a question, or of one class of it."""

    a: int = 0  # pairs of which the majority is for A
    b: int = 0
    tied: int = 0
    unanswered: int = 0
    few: int = 0  # answered by fewer than five
    many: int = 0  # by more, of whom the first five count
    agreeing: list[float] = field(default_factory=list)  # share of a pair's raters that are of its majority

    def add(self, votes: list[str]) -> None:
        """The votes on a pair, in the order in which raters sent them."""
        self.many += len(votes) > RATERS
        votes = votes[:RATERS]
        a = votes.count("A")
        b = len(votes) - a
        self.unanswered += not votes
        self.few += 0 < len(votes) < RATERS
        self.a, self.b, self.tied = self.a + (a > b), self.b + (b > a), self.tied + (a == b > 0)
        if votes:
            self.agreeing.append(max(a, b) / len(votes))

    def result(self) -> dict[str, Any]:
        """What is written to the file; shares are of the pairs with a majority, None where there is none."""
        decided = self.a + self.b
        low, high = wilson(self.a, decided)
        return {"pairs": decided + self.tied + self.unanswered, "a": self.a, "b": self.b, "tied": self.tied,
                "unanswered": self.unanswered, "fewer_than_five": self.few, "more_than_five": self.many,
                "share_a": self.a / decided if decided else None, "low": low, "high": high,
                "agreement": sum(self.agreeing) / len(self.agreeing) if self.agreeing else None}  # fmt: skip


def wilson(wins: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), 95 % unless z says otherwise; (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    share, room = wins / n, z * z / n
    centre = (share + room / 2) / (1 + room)
    half = z / (1 + room) * math.sqrt(share * (1 - share) / n + room / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def read_answers(folder: Path, key: dict[str, Any]) -> tuple[Votes, list[str]]:
    """The answers in a folder of files that raters have sent, and what is odd about them, in sentences.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file is no answers file, or answers another page.
    """
    files = [(path, read(path, key)) for path in sorted(folder.glob("*.json"))]
    if not files:
        raise FileNotFoundError(f"there are no answers in {folder}: put the files that raters send there.")
    files.sort(key=lambda file: str(file[1]["saved"]))  # where a rater has answered twice, the later counts
    sent = Counter(answers["rater"] for _, answers in files)
    votes: Votes = defaultdict(dict)
    sides: Counter[str] = Counter()
    for path, answers in files:
        for answer in answers["answers"]:
            pair = key["pairs"].get(answer["pair"])
            for question in key["questions"]:
                chosen = answer.get(question)
                if chosen is None and pair:
                    continue
                if not pair or chosen not in (pair["A"], pair["B"]):
                    raise ValueError(f"{path} names a film or pair that is not on the page: it has been changed.")
                votes[question, answer["pair"]][answers["rater"]] = "A" if chosen == pair["A"] else "B"
                sides["left" if chosen == answer["left"] else "right"] += 1
    told = [f"Rater '{name}' has sent {n} files; where they answer the same, the one saved later counts."
            for name, n in sent.items() if n > 1]  # fmt: skip
    total = len(key["pairs"])
    for name in sent:
        done = min(sum(name in votes[question, pair] for pair in key["pairs"]) for question in key["questions"])
        if done < total:
            told.append(f"Rater '{name}' has answered {done} of {total} pairs.")
    told.append(f"The film on the left was chosen in {sides['left'] / max(1, sides.total()):.0%} of all answers.")
    return votes, told


def read(path: Path, key: dict[str, Any]) -> dict[str, Any]:
    """One file of answers, with all that is needed in it."""
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(answers["rater"], str) and answers["saved"] and all(
            isinstance(answer["pair"], str) and answer["left"] for answer in answers["answers"])  # fmt: skip
        page = answers["page"]
    except (ValueError, KeyError, TypeError):
        whole, page = False, ""
    if not whole:
        raise ValueError(f"{path} is not a file of answers as the page saves it: ask the rater for it again.")
    if page != key["page"]:
        raise ValueError(f"{path} answers another page than that of {path.parent.parent / 'key.json'}: take it away.")
    answers["rater"] = " ".join(answers["rater"].split()).lower()
    return answers


def tally(out: Path) -> tuple[dict[str, Any], list[str]]:
    """Count the answers in `<out>/answers`; returns what is written to `<out>/tally.json`, and sentences on it."""
    place = out / "key.json"
    if not place.is_file():
        raise FileNotFoundError(f"there is no key.json in {out}: make a page with `make human-eval A=folder B=folder`.")
    key = json.loads(place.read_text())
    votes, told = read_answers(out / "answers", key)
    classes = sorted({pair["class"] for pair in key["pairs"].values()} - {""})
    result: dict[str, Any] = {"systems": key["systems"], "raters": len({r for v in votes.values() for r in v})}
    for question in key["questions"]:
        counts = {name: Count() for name in ("all", *classes)}
        for name, pair in key["pairs"].items():
            cast = list(votes.get((question, name), {}).values())
            for group in ("all", *filter(None, [pair["class"]])):
                counts[group].add(cast)
        result[question] = {name: count.result() for name, count in counts.items()}
        told += gaps(question, counts["all"])
    result["published"] = [dict(zip(("against", "prompts", *key["questions"]), row, strict=True)) for row in PUBLISHED]
    (out / "tally.json").write_text(json.dumps({**result, "remarks": told}, indent=1))
    return result, told


def gaps(question: str, count: Count) -> list[str]:
    """What a share of this question is not computed on, or on less than the paper's."""
    told, of = [], f"of {count.a + count.b + count.tied + count.unanswered} pairs"
    if count.unanswered:
        told.append(f"{question}: {count.unanswered} {of} have no answer and count for nobody.")
    if count.tied:
        told.append(f"{question}: {count.tied} {of} are tied and count for nobody.")
    if count.few:
        told.append(f"{question}: {count.few} {of} have fewer than five raters; the paper has the majority of five.")
    if count.many:
        told.append(f"{question}: {count.many} {of} have more than five raters; those who saved first count.")
    return told


def table(result: dict[str, Any], questions: list[str]) -> str:
    """The shares as a table of text."""
    columns = (14, 20, 7, 7, 7, 7, 14, 19, 10)
    rows = [("", "", "pairs", "for A", "for B", "tied", "A preferred", "95 % interval", "agreeing")]
    for question in questions:
        for group, row in result[question].items():
            share = "-" if row["share_a"] is None else f"{row['share_a']:.2%}"
            agreeing = "-" if row["agreement"] is None else f"{row['agreement']:.0%}"
            rows.append((question if group == "all" else "", group, *(str(row[k]) for k in ("pairs", "a", "b", "tied")),
                         share, f"{row['low']:.1%} to {row['high']:.1%}", agreeing))  # fmt: skip
    return "\n".join(
        "".join(
            f"{cell:<{wide}}" if i < 2 else f"{cell:>{wide}}"
            for i, (cell, wide) in enumerate(zip(row, columns, strict=True))
        )
        for row in rows
    )


def published() -> str:
    """What the paper has in this place, as text."""
    rows = [f"  {other:<20}{prompts:<18}{a:>9.2f}%{b:>14.2f}%" for other, prompts, a, b in PUBLISHED]
    head = f"  {'against':<20}{'prompts':<18}{'quality':>10}{'faithfulness':>15}"
    return "\n".join(["The paper, Make-A-Video preferred:", head, *rows])


@for_people
def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise ValueError("usage: python -m experiments.human_tally [folder of `make human-eval`, runs/human]")
    out = Path(arguments[0] if arguments else "runs/human")
    result, told = tally(out)
    systems = result["systems"]
    print(f"A {systems['A']}, B {systems['B']}: {result['raters']} raters", table(result, ["quality", "faithfulness"]),
          published(), *told, out / "tally.json", sep="\n")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])

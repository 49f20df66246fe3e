"""Our scores beside the published ones: a table as markdown and in W&B.

`published.csv` has a row for each published number, with the method's paper and, where published sources disagree or
the setting is another, a note. The numbers are those quoted in comparisons; protocols differ, so only baselines run in
the same code compare strictly.
"""

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb

TABLE = Path(__file__).parent / "published.csv"
BETTER = {"FVD": "↓", "KVD": "↓", "FID": "↓", "CLIP-FID": "↓", "IS": "↑", "CLIPSIM": "↑"}
# The CLIPs of published numbers: of CLIPSIM both of OpenAI's (0.3049 with B/16 is 0.3001 with B/32), of CLIP-FID B/32.
BACKBONES = {
    "CLIPSIM": ("ViT-B-32/openai", "ViT-B-16/openai", "ViT-B-32-quickgelu/openai", "ViT-B-16-quickgelu/openai"),
    "CLIP-FID": ("ViT-B-32/openai", "ViT-B-32-quickgelu/openai"),
}
LONG = ("method", "setting", "size", "metric", "value", "low", "high", "paper", "note")


def published(benchmark: str) -> list[dict[str, str]]:
    """The published numbers of a benchmark, one a row."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["benchmark"] == benchmark]


def column(name: str, score: dict[str, Any]) -> str:
    """The published column that a score of ours belongs in; "" for one that has another name or another network."""
    found = name.upper().replace("_", "-")
    if found not in BETTER:
        return ""
    return found if score.get("backbone") in BACKBONES.get(found, (score.get("backbone"),)) else ""


def markdown(result: dict[str, Any]) -> str:
    """The result of an evaluation as a page: the table, what does not belong in it, and what each was computed on."""
    rows, scores, notes = published(result["benchmark"]), result["scores"], result["notes"]
    own = {column(name, score): score for name, score in scores.items()}
    columns = [name for name in BETTER if name in own or any(row["metric"] == name for row in rows)]
    lines = [f"# {result['benchmark']}, {result['size']}", ""]
    if columns:
        heads = ["method", "setting", "size", *(f"{name} {BETTER[name]}" for name in columns), "paper"]
        lines += table_row(heads) + table_row(["---"] * len(heads))
    told: list[str] = []
    for key in dict.fromkeys((row["method"], row["setting"], row["size"], row["paper"]) for row in rows):
        cells = [""] * len(columns)
        for row in rows:
            if key == (row["method"], row["setting"], row["size"], row["paper"]):
                cells[columns.index(row["metric"])] = row["value"] + footnote(row["note"], told)
        lines += table_row([*key[:3], *cells, key[3]])
    if set(own) & set(columns):
        mark, side = footnote("; ".join(notes), told), str(result["samples"]["resolution"])
        cells = [number(own[name]) + mark if name in own else "" for name in columns]
        lines += table_row([f"**ours, {result['size']}**", result["setting"], side, *cells, ""])
    lines += [""] + [f"[{i}] {note}" for i, note in enumerate(told, 1)] + ([""] if told else [])
    apart = [name for name, score in scores.items() if not column(name, score)]
    if apart:
        lines += ["Ours, of other networks than the published ones: **these compare with no published number.**", ""]
        lines += table_row(["score", "value, 95 % interval"]) + table_row(["---"] * 2)
        for name in apart:
            lines += table_row([name, number(scores[name])])
        lines += [""]
    lines += ["Computed on:", ""]
    lines += [f"- {name}: {said(score)}" for name, score in scores.items()]
    about = {key: said(result.get(key, {})) for key in ("samples", "real", "skipped")}
    lines += [f"- {key}: {text}" for key, text in about.items() if text]
    lines += [f"- {note}" for note in notes]
    return "\n".join(lines) + "\n"


def table_row(cells: list[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def footnote(note: str, told: list[str]) -> str:
    """The mark of a note, which is added to those told."""
    if not note:
        return ""
    if note not in told:
        told.append(note)
    return f" [{told.index(note) + 1}]"


def number(score: dict[str, Any]) -> str:
    """A value with its interval."""
    value, interval = score["value"], score.get("interval")
    digits = 4 if abs(value) < 10 else 2
    told = f"{value:.{digits}f}"
    return told + (f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else "")


def said(values: dict[str, Any]) -> str:
    """A dictionary in a line, without what is not known."""
    return ", ".join(
        f"{key} {said(value) if isinstance(value, dict) else value}"
        for key, value in values.items()
        if value not in (None, {}, [], "") and key not in ("value", "interval", "name")
    )


def long(result: dict[str, Any]) -> Iterator[list[Any]]:
    """Every number, published and ours, as rows of `LONG`. Ours come under their own names."""
    for row in published(result["benchmark"]):
        yield [
            row["method"],
            row["setting"],
            row["size"],
            row["metric"],
            row["value"],
            None,
            None,
            row["paper"],
            row["note"],
        ]
    for name, score in result["scores"].items():
        low, high = score.get("interval") or (None, None)
        own = [f"ours, {result['size']}", result["setting"], str(result["samples"]["resolution"])]
        yield [*own, column(name, score) or name, f"{score['value']:.6g}", low, high, "", "; ".join(result["notes"])]


def log_wandb(result: dict[str, Any], folder: Path, project: str) -> None:
    """The table and our scores as a W&B run in `folder`, offline unless a key is set; prompts are not sent."""
    online = bool(os.environ.get("WANDB_API_KEY")) and os.environ.get("WANDB_MODE", "online") == "online"
    os.environ.setdefault("WANDB_SILENT", "true")
    name = f"{result['size']}/evaluate/{result['benchmark']}"
    with wandb.init(
        dir=folder,
        project=os.environ.get("WANDB_PROJECT", project),
        name=name,
        group=result["size"],
        job_type="evaluate",
        mode="online" if online else "offline",
        config={key: value for key, value in result.items() if key not in ("scores", "published")},
    ) as run:
        prefix = f"evaluate/{result['benchmark']}"
        table = wandb.Table(
            columns=list(LONG), data=[["" if x is None else str(x) for x in row] for row in long(result)]
        )
        run.log({f"{prefix}/table": table, **{f"{prefix}/{k}": v["value"] for k, v in result["scores"].items()}})

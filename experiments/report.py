"""`python -m experiments.report SIZE|FOLDER [key=value ...]`: one HTML page of a run, or of all of a size.

The page, `report.html` in that folder, holds its pictures, clips and curves itself: it can be mailed. It is made from
what lies in the run folders; no account, no server.
"""

import base64
import csv
import io
import json
import re
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from experiments import build
from experiments.charts import Points, bars, curves, number
from experiments.cli import for_people
from experiments.config import load
from lightning_modules.monitor import LEVELS
from lightning_modules.wandb_logger import records

ABOUT = {
    "clip": "pictures and captions to one space",
    "prior": "text to the embedding of a picture",
    "decoder": "embedding to a small picture",
    "sr_low": "small picture to a larger one",
    "sr_high": "larger picture to the largest",
    "decoder_video": "embedding to sixteen small frames",
    "sr_low_video": "small frames to larger ones",
    "sr_high_video": "larger frames to the largest",
    "interpolation": "frames between the frames",
}
PICTURES = 6  # of a stage, evenly over its steps
WIDEST, LARGEST = 1200, 2 << 20  # pixels of a picture, bytes of a clip


def report(folder: Path) -> Path:
    """Write `report.html` into a run folder, or into a folder of run folders, and return its path.

    Raises:
        FileNotFoundError: nothing has been trained there.
    """
    names = [*build.STAGES, *(p.name for p in sorted(folder.glob("*")) if p.name not in build.STAGES)]
    runs = [folder] if is_run(folder) else [folder / name for name in names if is_run(folder / name)]
    if not runs:
        raise FileNotFoundError(f"there is no run in {folder}: train a stage first, as with `make train-clip`.")
    title = f"{folder.parent.name} / {folder.name}" if runs == [folder] else folder.name
    links = "".join(f'<a href="#{escape(run.name)}">{symbol(run.name)}</a>' for run in runs)
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Make-A-Video: {escape(title)}</title><style>{style}</style></head><body><main>
<h1>Make-A-Video: {escape(title)}</h1>{overview(runs)}<nav>{links if len(runs) > 1 else ""}</nav>
{"".join(stage(run) for run in runs)}
</main></body></html>
"""
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def is_run(folder: Path) -> bool:
    return (folder / "metrics.csv").is_file()


def overview(runs: list[Path]) -> str:
    """One line on all runs."""
    done = [summary for run in runs if (summary := read_json(run / "summary.json"))]
    seconds = sum(summary["seconds"] for summary in done)
    return (
        f"<p>{len(done)} of {len(runs)} stages finished · {duration(seconds)} of training</p>" if len(runs) > 1 else ""
    )


def stage(run: Path) -> str:
    """The section of one run folder."""
    metrics, timings = columns(run / "metrics.csv"), columns(run / "timings.csv")
    summary, config = read_json(run / "summary.json"), resolved(run)
    steps = max((x for points in metrics.values() for x, _ in points), default=0)
    wanted = config.get("trainer", {}).get("max_steps")
    if summary:
        state = f'<span class="state">finished, {summary["steps"]:,} steps</span>'
    else:
        state = f'<span class="state open">at step {int(steps) + 1:,}{f" of {wanted:,}" if wanted else ""}</span>'
    drawn = "".join([*charts(metrics, timings), histogram(run)])
    return f"""<section id="{escape(run.name)}"><div class="head"><h2>{symbol(run.name)}</h2>
<p>{ABOUT.get(run.name, "")}</p>{state}</div>
<div class="tiles">{"".join(tiles(summary, metrics, timings))}</div>
<div class="charts">{drawn}</div>
{pictures(run / "samples", "Samples of a fixed batch, by the averaged weights")}
{pictures(run / "prompted", "At fixed prompts and seeds: a row of real ones, a row made")}
{counters(metrics)}
<details><summary>Config of this stage</summary><pre>{escape(OmegaConf.to_yaml(config))}</pre></details></section>
"""


def tiles(summary: dict[str, Any], metrics: dict[str, Points], timings: dict[str, Points]) -> Iterable[str]:
    """The numbers that come first."""

    def tile(value: str, name: str) -> str:
        return f'<div class="tile"><b>{value}</b><span>{name}</span></div>'

    if summary:
        yield tile(number(summary["parameters"]), "parameters")
        yield tile(duration(summary["seconds"]), "of training")
        yield tile(f"{summary['first_loss']:.2g} → {summary['last_loss']:.2g}", "loss, fixed batch")
    elif loss := metrics.get("loss"):
        yield tile(number(mean(loss[-20:])), "loss, last 20 rows")
    if seen := metrics.get("data/seen"):
        yield tile(number(seen[-1][1]), "samples seen")
    if speed := timings.get("time/samples_per_second"):
        yield tile(number(mean(speed)), "samples a second")
    if share := timings.get("time/share_of_peak"):
        yield tile(f"{mean(share):.1%}", "of peak FLOP/s")
    if waiting := timings.get("time/share_waiting_for_data"):
        yield tile(f"{mean(waiting):.1%}", "waiting for data")
    for name in metrics:
        if name.split("/")[0] in ("preview", "validation"):
            yield tile(number(metrics[name][-1][1]), f"{name.split('/')[1]}, {name.split('/')[0]}")


def charts(metrics: dict[str, Points], timings: dict[str, Points]) -> Iterable[str]:
    """The curves of a stage: does it learn, how well, how fast."""
    yield curves("Loss", {"loss": metrics.get("loss", [])}, log=True)
    names = {0: "t0 least noise", LEVELS - 1: f"t{LEVELS - 1} most"}
    levels = {names.get(i, f"t{i}"): metrics.get(f"loss/t{i}", []) for i in range(LEVELS)}
    yield curves("Loss by noise level", levels, log=True)
    for name in metrics:
        if name.split("/")[0] in ("preview", "validation"):
            yield curves(f"{name.split('/')[1]}, {name.split('/')[0]}", {name: metrics[name]})
    yield curves("Gradient norm", {"norm": metrics.get("gradient_norm", [])}, log=True)
    yield curves("Learning rate", {"rate": metrics.get("learning_rate", [])}, noisy=False)
    yield curves("Samples a second", {"samples": timings.get("time/samples_per_second", [])})
    shares = {"of peak FLOP/s": "time/share_of_peak", "waiting for data": "time/share_waiting_for_data"}
    yield curves("Shares of time and peak", {name: timings.get(key, []) for name, key in shares.items()})
    yield curves("Frames a second, mean of a batch", {"fps": metrics.get("data/fps", [])})


def histogram(run: Path) -> str:
    """The frame rates of the clips of a run, from its W&B file: the one place where they are."""
    counts: dict[float, float] = {}
    for path in sorted(run.glob("wandb/*run-*/run-*.wandb")):
        for record in records(path):
            row = {
                ".".join(i.nested_key): i.value_json for i in record.history.item if "rates" in "".join(i.nested_key)
            }
            values: list[float] = next((json.loads(v) for k, v in row.items() if k.endswith("data/rates.values")), [])
            edges: list[float] = next((json.loads(v) for k, v in row.items() if k.endswith("data/rates.bins")), [])
            for n, left, right in zip(values, edges, edges[1:], strict=False):
                counts[(left + right) / 2] = counts.get((left + right) / 2, 0) + n
    return bars("Clips by frames a second", dict(sorted(counts.items())), "clips")


def pictures(folder: Path, title: str) -> str:
    """Pictures over the steps, evenly chosen with the last among them, and the last clip."""
    stills = sorted(folder.glob("step_*.png"))
    if not stills:
        return ""
    last = len(stills) - 1
    shown = [stills[round(i * last / (PICTURES - 1))] for i in range(PICTURES)] if last >= PICTURES else stills
    found = [
        f"<figure>{embedded(path)}<figcaption><span>{step_of(path)}</span></figcaption></figure>" for path in shown
    ]
    for clip in sorted(folder.glob("step_*.mp4"))[-1:]:
        if clip.stat().st_size <= LARGEST:
            data = base64.b64encode(clip.read_bytes()).decode()
            video = f'<video src="data:video/mp4;base64,{data}" autoplay loop muted controls playsinline></video>'
            found.append(f"<figure>{video}<figcaption><span>{step_of(clip)}, in motion</span></figcaption></figure>")
    prompts = read_json(folder / "prompts.json")
    told = f"<p>{escape(' · '.join(prompts))}</p>" if prompts else ""
    return f'<h3>{title}</h3><div class="pictures">{"".join(found)}</div>{told}'


def embedded(path: Path) -> str:
    """An <img> that holds the picture: as it is, or made smaller where it is large."""
    image: Image.Image = Image.open(path)
    data, kind = path.read_bytes(), "png"
    if image.width > WIDEST or len(data) > 200_000:
        image = image.convert("RGB")
        image.thumbnail((WIDEST, 8 * WIDEST))
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=85)
        data, kind = buffer.getvalue(), "webp"
    return f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" alt="{step_of(path)}">'


def counters(metrics: dict[str, Points]) -> str:
    """What the data module has counted, at the end."""
    rows = []
    for name, points in metrics.items():
        last = points[-1][1]
        if name == "data/kept":
            rows.append(("samples that the filters left", f"{last:.1%}"))
        elif name.startswith("data/filtered/"):
            rows.append((f"taken by the filter {name.removeprefix('data/filtered/')}", f"{last:.0f}"))
        elif name == "data/skipped":
            rows.append(("samples that could not be read", f"{last:.0f}"))
        elif name.startswith("data/skipped_by_cause/"):
            rows.append((name.removeprefix("data/skipped_by_cause/").replace("_", " "), f"{last:.0f}"))
        elif name == "data/captions_cut":
            rows.append(("captions cut at CLIP's length, of a batch", f"{mean(points):.2g}"))
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{value}</td></tr>" for name, value in rows)
    return f"<h3>Data</h3><table>{cells}</table>" if rows else ""


def columns(path: Path) -> dict[str, Points]:
    """The columns of a CSV file of metrics as (step, value), steps rising."""
    found: dict[str, list[tuple[float, float]]] = {}
    if path.is_file():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name != "step" and value:
                        found.setdefault(name, []).append((float(row["step"]), float(value)))
    return {name: sorted(points) for name, points in found.items()}


def resolved(run: Path) -> Any:
    """The stage's section of the run's config, or all of it where the folder is no stage's."""
    path = run / "config.yaml"
    config: Any = OmegaConf.load(path) if path.is_file() else OmegaConf.create({})
    return config.get(run.name, config)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else {}


def symbol(name: str) -> str:
    """A stage's symbol as in the paper, D^t with the t raised."""
    title = escape(build.STAGES[name].title if name in build.STAGES else name)
    return re.sub(r"\^(\w)", r"<sup>\1</sup>", re.sub(r"_(\w)", r"<sub>\1</sub>", title)) if name in ABOUT else title


def step_of(path: Path) -> str:
    return f"step {int(path.stem.removeprefix('step_')):,}"


def mean(points: Points) -> float:
    return sum(y for _, y in points) / len(points)


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


@for_people
def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m experiments.report SIZE|FOLDER [key=value ...]")
    folder = Path(arguments[0])
    if not folder.is_dir():
        config = load(arguments[0], arguments[1:])
        folder = Path(config.runs) / config.size
    print(report(folder))


if __name__ == "__main__":
    main(sys.argv[1:])

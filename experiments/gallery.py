"""`python -m experiments.gallery SIZE [FOLDER] [key=value ...]`: a page of films beside real clips, with scores.

The films are the clips that were made for the scores, `runs/<size>/evaluate/samples`, without them those of
`runs/<size>/films`, or those of any folder. The real clip is the one that `evaluate` has noted for the sentence: the
clip of that name, the captioned video of MSR-VTT, one of the class of UCF-101. The page, `gallery.html` in that folder,
holds its films itself.
"""

import base64
import csv
import json
import sys
from html import escape
from pathlib import Path
from typing import Any

from experiments.benchmarks import prompted
from experiments.cli import for_people
from experiments.config import Config, load
from experiments.samples import PROMPTS, Sample, films_in, playable, read, read_prompts, samples

MOST = 48  # films on a page, evenly chosen
SIDE, SECONDS, LARGEST = 256, 10, 200_000  # a larger file is embedded at so many pixels a side, and its beginning
PLAY = """
const turn = (film) => (film.isIntersecting ? film.target.play() : film.target.pause());
const seen = new IntersectionObserver((films) => films.forEach(turn));
document.querySelectorAll("video").forEach((film) => seen.observe(film));
"""  # a page of a hundred films plays those that are looked at


def gallery(folder: Path, config: Config) -> Path:
    """Write the page for a folder of films and return its path.

    Raises:
        FileNotFoundError: there are no films.
        ValueError: a film is unreadable.
    """
    real = beside(folder, config)
    shown = samples(folder, [*read_prompts(PROMPTS), *real], MOST)
    with_real = sum(film.prompt in real for film in shown)
    told = f"{len(shown)} of {len(films_in(folder))} films in {folder.name}, {with_real} beside a real clip"
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Make-A-Video: films of {escape(config.size)}</title><style>{style}</style></head><body><main>
<h1>Make-A-Video: films of {escape(config.size)}</h1><p>{escape(told)}</p>
{scores(read_scores(Path(config.runs) / config.size / "evaluate", folder))}
<section><div class="pairs">{"".join(card(film, real.get(film.prompt)) for film in shown)}</div></section>
</main><script>{PLAY}</script></body></html>
"""
    path = folder / "gallery.html"
    path.write_text(page, encoding="utf-8")
    return path


def real_clips(config: Config) -> dict[str, str]:
    """Sentence -> real clip, of the clips that have a name in the CSV of their folder; empty where there is none.

    The folder is evaluate.clips, else data.clips.
    """
    found: dict[str, str] = {}
    for table in sorted(Path(config.evaluate.clips or config.data.clips).glob("*.csv")):
        with table.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                path = table.parent / (row.get("page_dir") or "") / f"{row.get('videoid')}.mp4"
                if row.get("name") and path.is_file():
                    found.setdefault(prompted(config.evaluate.prompt, row["name"]), str(path))
    return found


def beside(folder: Path, config: Config) -> dict[str, Path]:
    """Sentence -> real clip: as the evaluation that made these films wrote them, without it the named clips."""
    path = folder / "real.json"
    found = json.loads(path.read_text()) if path.is_file() else real_clips(config)
    return {prompt: Path(file) for prompt, file in found.items() if Path(file).is_file()}


def scores(results: list[dict[str, Any]]) -> str:
    """A tile for each score of these films, with its interval, and what each was computed on."""
    tiles, rows = "", ""
    for result in results:
        for name, score in result["scores"].items():
            interval = score.get("interval")
            span = f", {digits(interval[0])} to {digits(interval[1])}" if interval else ""
            named = f"{name}, {score['backbone']}" if "backbone" in score else name
            tiles += f'<div class="tile"><b>{digits(score["value"])}</b><span>{escape(named)}{span}</span></div>'
            told = {k: v for k, v in score.items() if k not in ("value", "interval", "name") and v not in (None, "")}
            about = ", ".join(f"{k} {v}" for k, v in {**told, **plain(result.get("samples", {}))}.items())
            rows += f"<tr><td>{escape(name)}</td><td>{escape('; '.join([about, *result.get('notes', [])]))}</td></tr>"
    return tiles and (
        f'<section><div class="head"><h2>Scores</h2></div><div class="tiles">{tiles}</div>'
        f'<details><summary>What they were computed on</summary><table class="told">{rows}</table></details></section>'
    )


def digits(value: float) -> str:
    """A score with the digits in which it is published: 0.3049, 367.23."""
    return f"{value:.{4 if abs(value) < 10 else 2}f}"


def plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, int | float) or key == "output"}


def card(film: Sample, real: Path | None) -> str:
    """A film, beside the real clip where there is one, below its sentence."""
    both = [("made", film), *([("real", read(real, {}, film.prompt))] if real else [])]
    drawn = "".join(f"<div>{embedded(clip)}<span>{name}</span></div>" for name, clip in both)
    return f'<figure class="pair"><figcaption>{escape(film.prompt)}</figcaption><div>{drawn}</div></figure>'


def embedded(film: Sample) -> str:
    """A <video> that holds the film, of a large file its beginning."""
    large = film.path.stat().st_size > LARGEST
    data, kind = playable(film, SIDE if large else 0, SECONDS if large else 0)
    source = f"data:video/{kind};base64,{base64.b64encode(data).decode()}"
    return f'<video src="{source}" loop muted playsinline controls preload="metadata"></video>'


def read_scores(folder: Path, films: Path) -> list[dict[str, Any]]:
    """The evaluations in a folder that are of these films."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [
        result
        for result in found
        if "scores" in result and Path(result.get("samples", {}).get("folder", "")).resolve() == films.resolve()
    ]


@for_people
def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m experiments.gallery SIZE [folder of films] [key=value ...]")
    size, *rest = arguments
    named = [a for a in rest if "=" not in a]
    config = load(size, [a for a in rest if "=" in a])
    run = Path(config.runs) / config.size
    made = run / "evaluate" / "samples"
    print(gallery(Path(named[0]) if named else made if made.is_dir() else run / "films", config))


if __name__ == "__main__":
    main(sys.argv[1:])

"""`python -m experiments.curve SIZE [evaluate.samples=32 ...]`: quality of D^t's clips by the number of network calls.

The distance from real clips (FVD, or fvd_random without I3D's weights) for each sampler at several numbers of steps,
with the same prompts, embeddings and noise for all. Writes `<runs>/<size>/curve/`: a file of features for each point,
so that an interrupted command goes on, `curve.json` and `curve.svg`.
"""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments import build
from experiments.benchmarks import folder_task, some
from experiments.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Points, grid, line, linear_ticks, mark
from experiments.cli import for_people
from experiments.config import Config, load
from experiments.generate import make_cascade
from experiments.sampling import short
from experiments.scores import real_clips
from lightning_modules.media import as_bytes
from lightning_modules.metrics.fvd import FrechetVideoDistance, frechet_distance
from lightning_modules.whole import whole
from models.sampling import PRESETS

# DDIM at 250, which takes most of the time, is what the others are held to.
# A curve's sampler, bend of its times, and numbers of steps.
POINTS: dict[str, tuple[str, float, tuple[int, ...]]] = {
    "dpmpp_2m, bend 1.5": ("dpmpp_2m", 1.5, (10, 25)),
    "dpmpp_2m": ("dpmpp_2m", 1.0, (5, 8, 10, 15, 20, 25)),
    "ddim": ("ddim", 1.0, (5, 10, 25, 50, 250)),
}
STYLE = (
    "text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}polyline{fill:none;stroke-width:2}"
    ".c2{stroke:#3a8f4d;fill:#3a8f4d}polyline.c2{fill:none}text.c2{fill:#3a8f4d;stroke:none}"
    ".c0{stroke:#0b6cb0;fill:#0b6cb0}.c1{stroke:#d1495b;fill:#d1495b}polyline.c0,polyline.c1{fill:none}"
    "text.c0{fill:#0b6cb0;stroke:none}text.c1{fill:#d1495b;stroke:none}"
)


def curve(config: Config) -> dict[str, Any]:
    """Measure what is not measured yet; returns what is written to `curve.json`."""
    folder = build.run_folder(config, "curve")
    folder.mkdir(parents=True, exist_ok=True)
    settings, fps = config.evaluate, config.cascade.fps
    maker, fvd = make_cascade(config), FrechetVideoDistance(settings.i3d or None, settings.i3d_sha256 or None)
    task = folder_task(config)
    texts, clips = task.prompts, some(task.clips, len(task.prompts), config.seed)
    cascade, own = maker.config, maker.config.decoder  # each point has its own sampler and steps, and the page's rest
    run = short([maker.digest(), str(maker.dtype), fvd.name, getattr(fvd, "digest", None), config.seed, fps, texts,
                  [clip.name for clip in clips], cascade.frames, cascade.candidates, asdict(cascade.sampling("prior")),
                  task.real])  # fmt: skip
    seeds = [config.seed + k for k in range(len(texts))]
    parts = [slice(start, start + settings.batch_size) for start in range(0, len(seeds), settings.batch_size)]

    def kept(name: str, make: Callable[[], Tensor]) -> Tensor:
        """What a file holds, or what is then written to it."""
        path = folder / f"{name}-{run}.safetensors"
        if not path.is_file():
            with whole(path) as part:
                save_file({"values": make().cpu().contiguous()}, part)
        return load_file(path)["values"]

    def features(part: slice) -> Tensor:
        return fvd.features(as_bytes(maker.decode(embeddings[part], fps, seeds[part])))

    embeddings = kept("embeddings", lambda: maker.embed(texts, seeds)).to(maker.device)
    real = kept("real", lambda: torch.cat([fvd.features(clip) for clip, _ in real_clips(config, clips)]))
    distances: dict[str, dict[int, float]] = {curve: {} for curve in POINTS}
    for curve, (sampler, bend, counts) in POINTS.items():
        for steps in counts:
            maker.config = replace(cascade, decoder=replace(own, sampler=sampler, steps=steps, bend=bend))
            name = f"{sampler}-{steps}-{short([own.guidance, own.rescale, own.noise, own.alpha, bend])}"
            made = [kept(f"{name}-{part.start}-{part.stop}", partial(features, part)) for part in parts]
            distances[curve][steps] = float(frechet_distance(real, torch.cat(made)))
            print(f"{curve:<20} {steps:>4} steps  {fvd.name} {distances[curve][steps]:.4f}", flush=True)
    anchor = distances["ddim"][max(distances["ddim"])]
    sampler, steps, bend = PRESETS["standard"]["decoder"]
    standard = next(name for name, (*which, _) in POINTS.items() if which == [sampler, bend])
    result = {
        "metric": fvd.name,
        "samples": len(texts),
        "guidance": own.guidance,
        "distances": distances,
        "standard": {"curve": standard, "steps": steps, "over_ddim_250": distances[standard][steps] / anchor},
    }
    (folder / "curve.json").write_text(json.dumps(result, indent=2))
    (folder / "curve.svg").write_text(plot(distances, fvd.name, len(texts)))
    return result


def plot(distances: dict[str, dict[int, float]], metric: str, samples: int) -> str:
    """The curves as an SVG that stands alone: distance over the number of calls, which is drawn logarithmically."""
    points: dict[str, Points] = {name: sorted(found.items()) for name, found in distances.items()}
    xs, ys = zip(*(p for found in points.values() for p in found), strict=True)
    ticks = linear_ticks(min(ys), max(ys))
    low, high, first, last = min(ticks), max(*ticks, *ys), min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        right = math.log(x / first) / math.log(last / first)
        return LEFT + right * (RIGHT - LEFT), BOTTOM - (y - low) / (high - low) * (BOTTOM - TOP)

    parts = [grid(y, place(first, y)[1]) for y in ticks]
    parts += [mark(x, place(x, low)[0]) for x in (5, 10, 25, 50, 100, 250) if first <= x <= last]
    for i, (name, found) in enumerate(points.items()):
        places = [place(*p) for p in found]
        parts.append(line(places, i, "curve"))
        parts += [f'<circle class="c{i}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places]
        parts.append(f'<text class="c{i}" x="{RIGHT - 4}" y="{TOP + 14 + 15 * i}" text-anchor="end">{name}</text>')
    title = f"{metric} of {samples} clips of D^t by steps"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -18 {WIDTH} {HEIGHT + 18}" width="{2 * WIDTH}">'
        f'<style>{STYLE}</style><rect y="-18" width="{WIDTH}" height="{HEIGHT + 18}" fill="white"/>'
        f'<text x="{LEFT}" y="-4">{title}</text>{"".join(parts)}</svg>\n'
    )


@for_people
def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m experiments.curve SIZE [key=value ...]")
    config = load(arguments[0], arguments[1:], section="evaluate")
    result = curve(config)
    standard = result["standard"]
    print(f"standard ({standard['curve']}, {standard['steps']} steps) is at {standard['over_ddim_250']:.4f} of the "
          f"distance of 250-step DDIM\n{build.run_folder(config, 'curve') / 'curve.svg'}")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])

"""`python -m experiments.curve SIZE [over=calls|guidance] [samples=32 ...]`: quality of D^t's clips by a setting.

calls: the distance from real clips (FVD, or fvd_random without I3D's weights) for each sampler by the number of network
calls. guidance: that distance and CLIPSIM, sampled as the page says, by the strength of classifier-free guidance. All
points have the same prompts, embeddings and noise. Writes `<runs>/<size>/curve/`: a file of features for each point, so
that an interrupted command goes on, `<calls or guidance>.json` and `.svg`.
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
from experiments.sampling import sample_seed, short
from experiments.scores import real_clips, scoring_clip
from lightning_modules.media import as_bytes
from lightning_modules.metrics import CLIPSIM
from lightning_modules.metrics.fvd import FrechetVideoDistance, frechet_distance
from lightning_modules.whole import whole
from models.sampling import PRESETS, SamplingConfig

# DDIM at 250, which takes most of the time, is what the others are held to.
# A curve's sampler, bend of its times, and numbers of steps.
POINTS: dict[str, tuple[str, float, tuple[int, ...]]] = {
    "dpmpp_2m, bend 1.5": ("dpmpp_2m", 1.5, (10, 25)),
    "dpmpp_2m": ("dpmpp_2m", 1.0, (5, 8, 10, 15, 20, 25)),
    "ddim": ("ddim", 1.0, (5, 10, 25, 50, 250)),
}
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 4.0)
STYLE = (
    "text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}"
    ".c0{stroke:#0b6cb0;fill:#0b6cb0}.c1{stroke:#d1495b;fill:#d1495b}.c2{stroke:#3a8f4d;fill:#3a8f4d}"
    "polyline.curve{fill:none;stroke-width:2}text.c0,text.c1,text.c2{stroke:none}"
)


class Measure:
    """Scores of D^t's clips under any sampling, of one set of prompts and seeds; each batch is made once."""

    def __init__(self, config: Config):
        self.config, self.folder = config, build.run_folder(config, "curve")
        self.folder.mkdir(parents=True, exist_ok=True)
        settings, self.fps = config.evaluate, config.cascade.fps
        self.maker = make_cascade(config)
        self.clip = scoring_clip(config, self.maker.clip)
        fvd = FrechetVideoDistance(settings.i3d or None, settings.i3d_sha256 or None)
        self.fvd = fvd.to(self.maker.device)
        task = folder_task(config)
        self.texts, clips = task.prompts, some(task.clips, len(task.prompts), config.seed)
        self.seeds = [sample_seed(config.seed, k) for k in range(len(self.texts))]
        cascade = self.maker.config
        self.own = cascade.decoder  # each point has its own sampler, steps or guidance, and the page's rest
        self.run = short([self.maker.digest(), str(self.maker.dtype), self.fvd.name, getattr(self.fvd, "digest", None),
                          self.clip.name, self.seeds, self.fps, self.texts, [clip.name for clip in clips],
                          cascade.frames, cascade.candidates, asdict(cascade.sampling("prior")),
                          task.real])  # fmt: skip
        self.embeddings = self.kept("embeddings", lambda: self.maker.embed(self.texts, self.seeds))
        self.real = self.kept("real", lambda: torch.cat([self.fvd.features(v) for v, _ in real_clips(config, clips)]))

    def kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What a file holds, or what is then written to it."""
        path = self.folder / f"{name}-{self.run}.safetensors"
        if not path.is_file():
            with whole(path) as part:
                save_file({"values": make().cpu().contiguous()}, part)
        return load_file(path)["values"]

    def features(self, part: slice) -> Tensor:
        """A row for each clip: the features of the distance, then CLIPSIM."""
        clips = as_bytes(self.maker.decode(self.embeddings[part].to(self.maker.device), self.fps, self.seeds[part]))
        likeness = CLIPSIM(self.clip).to(clips.device)
        likeness.update(clips, self.texts[part])
        return torch.cat((self.fvd.features(clips), likeness.rows("fake")), dim=1)

    def point(self, sampling: SamplingConfig) -> tuple[float, float]:
        """Distance from real clips, and CLIPSIM, of D^t sampled so."""
        cascade, size = self.maker.config, self.config.evaluate.batch_size
        self.maker.config = replace(cascade, decoder=sampling)
        found = self.maker.sampling("decoder")
        name = f"{found.sampler}-{found.steps}-{short(asdict(found))}"
        parts = [slice(start, start + size) for start in range(0, len(self.texts), size)]
        rows = torch.cat([self.kept(f"{name}-{p.start}-{p.stop}", partial(self.features, p)) for p in parts])
        self.maker.config = cascade
        return float(frechet_distance(self.real, rows[:, :-1])), float(rows[:, -1].mean())


def calls(sampling: SamplingConfig) -> int:
    """Network calls of a clip: two a step under guidance."""
    return sampling.steps * (2 if sampling.guidance != 1 else 1)


def by_calls(config: Config) -> dict[str, Any]:
    """Measure what is not measured yet; returns what is written to `calls.json`."""
    measure = Measure(config)
    name, own = measure.fvd.name, measure.own
    distances: dict[str, dict[int, float]] = {curve: {} for curve in POINTS}
    for curve, (sampler, bend, counts) in POINTS.items():
        for steps in counts:
            sampling = replace(own, sampler=sampler, steps=steps, bend=bend)
            distances[curve][calls(sampling)] = measure.point(sampling)[0]
            print(f"{curve:<20} {steps:>4} steps  {name} {distances[curve][calls(sampling)]:.4f}", flush=True)
    anchor = distances["ddim"][max(distances["ddim"])]
    sampler, steps, bend = PRESETS["standard"]["decoder"]
    standard = next(curve for curve, (*which, _) in POINTS.items() if which == [sampler, bend])
    ratio = distances[standard][calls(replace(own, steps=steps))] / anchor
    title = f"{name} of {len(measure.texts)} clips of D^t by network calls, guidance {own.guidance:g}"
    result = {
        "metric": name,
        "samples": len(measure.texts),
        "seed": config.seed,
        "guidance": own.guidance,
        "distances": distances,
        "standard": {"curve": standard, "steps": steps, "over_ddim_250": ratio},
    }
    points: dict[str, Points] = {curve: sorted(found.items()) for curve, found in distances.items()}
    write(config, "calls", result, [panel(points, title, (5, 10, 25, 50, 100, 250, 500), logarithmic=True)])
    print(f"standard ({standard}, {steps} steps) is at {ratio:.4f} of the distance of 250-step DDIM")
    return result


def by_guidance(config: Config) -> dict[str, Any]:
    """Measure what is not measured yet; returns what is written to `guidance.json`."""
    measure = Measure(config)
    name, points = measure.fvd.name, {}
    for guidance in GUIDANCE:
        distance, likeness = points[guidance] = measure.point(replace(measure.own, guidance=guidance))
        print(f"guidance {guidance:<4g}  {name} {distance:.4f}  CLIPSIM {likeness:.4f}", flush=True)
    n = len(measure.texts)
    scores = {"distance": {g: far for g, (far, _) in points.items()}, "clipsim": {g: s for g, (_, s) in points.items()}}
    result = {"metric": name, "samples": n, "seed": config.seed, **scores}
    panels = [panel({title: list(scores[key].items())}, f"{title} of {n} clips of D^t by guidance", GUIDANCE, False)
              for title, key in ((name, "distance"), ("CLIPSIM", "clipsim"))]  # fmt: skip
    write(config, "guidance", result, panels)
    return result


def write(config: Config, what: str, result: dict[str, Any], panels: list[str]) -> None:
    """The numbers and their picture."""
    path = build.run_folder(config, "curve") / what
    for suffix, text in ((".json", json.dumps(result, indent=2)), (".svg", picture(panels))):
        with whole(path.with_suffix(suffix)) as part:
            part.write_text(text)
    print(path.with_suffix(".svg"))


def panel(curves: dict[str, Points], title: str, marks: tuple[float, ...], logarithmic: bool) -> str:
    """Curves in their frame, as the inside of an SVG."""
    xs, ys = zip(*(p for found in curves.values() for p in found), strict=True)
    ticks = linear_ticks(min(ys), max(ys))
    low, high, first, last = min(ticks), max(*ticks, *ys), min(xs), max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        right = math.log(x / first) / math.log(last / first) if logarithmic else (x - first) / (last - first)
        return LEFT + right * (RIGHT - LEFT), BOTTOM - (y - low) / (high - low) * (BOTTOM - TOP)

    parts = [grid(y, place(first, y)[1]) for y in ticks]
    parts += [mark(x, place(x, low)[0]) for x in marks if first <= x <= last]
    for i, (name, found) in enumerate(curves.items()):
        places = [place(*p) for p in found]
        parts.append(line(places, i, "curve"))
        parts += [f'<circle class="c{i}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places]
        if len(curves) > 1:
            parts.append(f'<text class="c{i}" x="{RIGHT - 4}" y="{TOP + 14 + 15 * i}" text-anchor="end">{name}</text>')
    return f'<text x="{LEFT}" y="-4">{title}</text>{"".join(parts)}'


def picture(panels: list[str]) -> str:
    """Panels side by side, as an SVG that stands alone."""
    wide, tall = WIDTH * len(panels), HEIGHT + 18
    inside = "".join(f'<g transform="translate({WIDTH * i},0)">{each}</g>' for i, each in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -18 {wide} {tall}" width="{max(2 * WIDTH, wide)}">'
        f'<style>{STYLE}</style><rect y="-18" width="{wide}" height="{tall}" fill="white"/>{inside}</svg>\n'
    )


OVER = {"calls": by_calls, "guidance": by_guidance}


@for_people
def main(arguments: list[str]) -> None:
    if not arguments:
        raise ValueError("usage: python -m experiments.curve SIZE [over=calls|guidance] [key=value ...]")
    own = [word.removeprefix("over=") for word in arguments[1:] if word.startswith("over=")]
    over = own[-1] if own else "calls"
    if over not in OVER:
        raise ValueError(f"over={over}: a curve is over {' or '.join(OVER)}.")
    OVER[over](load(arguments[0], [word for word in arguments[1:] if not word.startswith("over=")], section="evaluate"))


if __name__ == "__main__":
    main(sys.argv[1:])

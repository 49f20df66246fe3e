"""Scores of generated clips, read from their files beside the real ones while the networks compute."""

import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from tqdm import tqdm

from datamodules.scoring import CUT, Scored, Shown, look
from datamodules.video_sources import Clip as Video
from experiments import build
from experiments.benchmarks import Task, some
from experiments.config import Config
from lightning_modules.metrics import (
    CLIPSIM,
    CLIPFrechetDistance,
    FrechetInceptionDistance,
    FrechetVideoDistance,
    KernelVideoDistance,
    VideoInceptionScore,
)
from lightning_modules.metrics.weights import sha256_of
from models.clip import Clip

DISTANCES = ("fvd", "kvd", "fid", "clip_fid")  # which need real clips


def metric(config: Config, score: str, clip: Any) -> Any:
    """The metric of a score; without published weights it says so in its name."""
    named = config.evaluate
    if score in ("fvd", "kvd"):
        kind = FrechetVideoDistance if score == "fvd" else KernelVideoDistance
        return kind(named.i3d or None, named.i3d_sha256 or None)
    if score == "is":
        mean: Any = {"mean": named.c3d_mean or None, "mean_sha256": named.c3d_mean_sha256 or None}
        return VideoInceptionScore(named.c3d or None, named.c3d_sha256 or None, splits=named.splits, **mean)
    if score == "fid":
        return FrechetInceptionDistance(named.inception or None, named.inception_sha256 or None)
    return (CLIPFrechetDistance if score == "clip_fid" else CLIPSIM)(clip)


def scoring_clip(config: Config, own: Clip | None = None) -> Clip:
    """The CLIP of CLIPSIM and CLIP-FID: the cascade's own (loaded, if it is not given), or a pretrained one as in
    published numbers."""
    named, pretrained = config.evaluate.clip_name, config.evaluate.clip_pretrained
    if not named:
        return own or build.load_clip(config)
    known = open_clip.get_model_config(named)
    if known is None:
        raise ValueError(f"evaluate.clip_name: open_clip has no model '{named}'.")
    model = replace(config.clip.model, name=named, pretrained=pretrained, sha256="", embedding_width=known["embed_dim"])
    clip = build.load_clip(replace(config, clip=replace(config.clip, model=model)))
    if (path := Path(pretrained)).is_file():
        clip.name = f"{named}/{path.name}, sha256:{sha256_of(path)}"
    return clip


def metrics_of(config: Config, scores: tuple[str, ...]) -> dict[str, Any]:
    """The metrics of these scores with their networks.

    Raises FileNotFoundError and ValueError for weights that are not there, or not the ones they should be.
    """
    clip = scoring_clip(config) if {"clip_fid", "clipsim"} & set(scores) else None
    return {each: metric(config, each, clip) for each in scores}


def score(config: Config, metrics: dict[str, Any], made: list[Video], texts: list[str], task: Task) -> dict[str, Any]:
    """The scores of generated clips, against real ones of the task, with what they were computed on.

    metrics: as `metrics_of` makes them. made: the generated clips, and texts a prompt for each for CLIPSIM. Real
    are as many clips, or all there are, of as many frames, at the rate and the size of the generated ones.
    Raises ValueError where too few clips can be read, or they have several sizes.
    """
    settings, frames, seed, scores = config.evaluate, config.cascade.frames, config.seed, tuple(metrics)
    if len(made) < 2:
        raise ValueError(f"there are {len(made)} generated clips; a score needs at least two.")
    side, fps = look(made, frames)
    side = settings.resolution or side
    kinds = [Shown(made, frames, settings.resolution)]
    if any(each in DISTANCES for each in scores):
        kinds.append(Shown(some(task.clips, len(made), seed), frames, side, fps, seed))
    device = torch.device(build.device())
    metrics = {each: metrics[each].to(device) for each in scores}
    distances: dict[str, Metric] = {each: metrics[each] for each in scores if each in DISTANCES}
    # FVD and KVD are of the same features, which are computed once.
    groups = [["fvd", "kvd"]] if "kvd" in scores else [[each] for each in distances]
    together = MetricCollection(dict(distances), compute_groups=groups) if distances else None
    start = time.perf_counter()  # before the workers start: what they read ahead is waited for too
    scored = Scored(kinds, settings.batch_size, settings.workers)
    for batch in tqdm(scored, "scoring batches", file=sys.stderr):
        videos, real = batch["video"].to(device, non_blocking=True), bool(batch["kind"])
        if together is not None:
            together.update(videos, real=real)
        if not real and "is" in metrics:
            metrics["is"].update(videos)
        if not real and "clipsim" in metrics:
            metrics["clipsim"].update(videos, [texts[k] for k in batch["number"]])
    looking = time.perf_counter() - start
    check(scored, config, task)
    if together is not None:
        metrics |= dict(together.items(keep_base=True))
    found = {metrics[each].name: numbers(metrics[each]) for each in scores}
    return {"scores": found} | about(scored, side, looking, config, task)


def real_clips(config: Config, clips: list[Video]) -> Iterator[tuple[Tensor, list[int]]]:
    """Batches uint8 `b 3 f h w` of clips at the decoder's rate and size, with their numbers in the list."""
    shown = Shown(clips, config.cascade.frames, config.decoder.size, config.cascade.fps, config.seed)
    for batch in Scored([shown], config.evaluate.batch_size, config.evaluate.workers):
        yield batch["video"], batch["number"]


def numbers(metric: Any) -> dict[str, Any]:
    """The value of a metric, its interval, and what it says of itself."""
    interval = metric.interval() if hasattr(metric, "interval") else None
    told = {"value": float(metric.compute()), "interval": [float(x) for x in interval] if interval else None}
    return told | metric.summary()


def about(scored: Scored, side: int, seconds: float, config: Config, task: Task) -> dict[str, Any]:
    """What was read, what was left out, and how long the networks waited for it."""
    frames, seed = config.cascade.frames, config.seed
    result: dict[str, Any] = {
        "samples": {"n": scored.counts[0], "frames": frames, "resolution": side, "fps": round(scored.mean_rate(0), 3)}
        | {"cut": "none: their pixels as they are"},
        "skipped": {"generated": dict(scored.skipped[0])},
        "waiting": round(scored.waiting / seconds, 4),
        "seconds": {"scoring": round(seconds, 2), "waiting": round(scored.waiting, 2)},
        "notes": [],
    }
    if others := scored.sizes - {(side, side)}:
        result["samples"]["cut"] = f"{CUT} to {side}"
        sizes = ", ".join(f"{width}x{height}" for height, width in sorted(others)[:3]) + (
            "..." if len(others) > 3 else ""
        )
        result["notes"].append(f"generated clips of {sizes} pixels cut to {side}x{side} ({CUT})")
    if len(scored.kinds) > 1:
        cut = {"start": f"drawn from seed {seed}", "cut": f"{CUT} to {side}"}
        result["real"] = {"path": task.real, "n": scored.counts[1], "fps": round(scored.mean_rate(1), 3), **cut}
        result["skipped"]["real"] = dict(Counter(cause for _, cause in task.problems) + scored.skipped[1])
        if scored.counts[1] != scored.counts[0]:
            result["notes"].append(f"{scored.counts[1]:,} real clips, {scored.counts[0]:,} generated ones")
    for kind, causes in result["skipped"].items():
        result["notes"] += [f"{n:,} {kind} clips left out: {cause}" for cause, n in causes.items()]
    return result


def check_listed(config: Config, task: Task) -> float:
    """The share of the listed real clips that are not there; ValueError where it is more than data.max_skipped."""
    missing, listed = len(task.problems), len(task.problems) + len(task.clips)
    if missing > config.data.max_skipped * listed:
        name, cause = task.problems[0]
        raise ValueError(
            f"{missing} of the {listed} clips of {task.real} cannot be used, more than "
            f"data.max_skipped={config.data.max_skipped} allows: {cause} (as {name})."
        )
    return missing / max(1, listed)


def check(scored: Scored, config: Config, task: Task) -> None:
    """Raises ValueError where too few clips could be read for a score of them, those that are missing counted in."""
    for kind, n in enumerate(scored.counts):
        listed, whose = len(scored.kinds[kind]), f"clips of {task.real}" if kind else "generated clips"
        why = f": {scored.worst(kind)}." if scored.skipped[kind] else "."
        if n < 2:
            raise ValueError(f"{n} of the {listed} {whose} can be used, and a score needs at least two{why}")
        gone = check_listed(config, task) if kind else 0.0  # of all that are listed, of which `listed` were drawn
        if gone + (1 - gone) * (listed - n) / listed > config.data.max_skipped:
            allowed = f"more than data.max_skipped={config.data.max_skipped} allows"
            besides = f", besides {len(task.problems)} that are not there" if gone else ""
            raise ValueError(f"{listed - n} of the {listed} {whose} cannot be used{besides}, {allowed}{why}")

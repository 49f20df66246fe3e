"""Scores of generated clips, read from their files beside the real ones while the networks compute."""

import sys
import time
from dataclasses import replace
from typing import Any

import open_clip
import torch
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


def scoring_clip(config: Config) -> Clip:
    """The CLIP of CLIPSIM and CLIP-FID: the cascade's own, or a pretrained one as in published numbers."""
    named, pretrained = config.evaluate.clip_name, config.evaluate.clip_pretrained
    if not named:
        return build.load_clip(config)
    known = open_clip.get_model_config(named)
    if known is None:
        raise ValueError(f"evaluate.clip_name: open_clip has no model '{named}'.")
    model = replace(config.clip.model, name=named, pretrained=pretrained, sha256="", embedding_width=known["embed_dim"])
    return build.load_clip(replace(config, clip=replace(config.clip, model=model)))


def score(config: Config, scores: tuple[str, ...], made: list[Video], texts: list[str], task: Task) -> dict[str, Any]:
    """The scores of generated clips, against real ones of the task, with what they were computed on.

    made: the generated clips, and texts a prompt for each where CLIPSIM is asked for. Real are as many clips, or all
    there are, of as many frames, at the rate and the size of the generated ones.
    Raises ValueError where too few clips can be read, or they have several sizes.
    """
    settings, frames, seed = config.evaluate, config.cascade.frames, config.seed
    if len(made) < 2:
        raise ValueError(f"there are {len(made)} generated clips; a score needs at least two.")
    side, fps = look(made, frames)
    side = settings.resolution or side
    kinds = [Shown(made, frames, settings.resolution)]
    if any(each in DISTANCES for each in scores):
        kinds.append(Shown(some(task.clips, len(made), seed), frames, side, fps, seed))
    scored = Scored(kinds, settings.batch_size, settings.workers)
    device = torch.device(build.device())
    clip = scoring_clip(config) if {"clip_fid", "clipsim"} & set(scores) else None
    metrics: dict[str, Any] = {each: metric(config, each, clip).to(device) for each in scores}
    distances: dict[str, Metric] = {each: metrics[each] for each in scores if each in DISTANCES}
    # FVD and KVD are of the same features, which are computed once.
    groups = [["fvd", "kvd"]] if "kvd" in scores else [[each] for each in distances]
    together = MetricCollection(dict(distances), compute_groups=groups) if distances else None
    start = time.perf_counter()
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


def numbers(metric: Any) -> dict[str, Any]:
    """The value of a metric, its interval, and what it says of itself."""
    interval = metric.interval() if hasattr(metric, "interval") else None
    told = {"value": float(metric.compute()), "interval": [float(x) for x in interval] if interval else None}
    return told | metric.summary()


def about(scored: Scored, side: int, seconds: float, config: Config, task: Task) -> dict[str, Any]:
    """What was read, what was left out, and how long the networks waited for it."""
    frames, seed = config.cascade.frames, config.seed
    result: dict[str, Any] = {
        "samples": {"n": scored.counts[0], "frames": frames, "resolution": side, "fps": round(scored.mean_rate(0), 3)},
        "skipped": {"generated": dict(scored.skipped[0])},
        "waiting": round(scored.waiting / seconds, 4),
        "seconds": {"scoring": round(seconds, 2), "waiting": round(scored.waiting, 2)},
        "notes": [],
    }
    if len(scored.kinds) > 1:
        cut = {"start": f"drawn from seed {seed}", "cut": f"{CUT} to {side}"}
        result["real"] = {"path": task.real, "n": scored.counts[1], "fps": round(scored.mean_rate(1), 3), **cut}
        missing = {"the file is missing": len(task.problems)} if task.problems else {}
        result["skipped"]["real"] = missing | dict(scored.skipped[1])
        if scored.counts[1] != scored.counts[0]:
            result["notes"].append(f"{scored.counts[1]:,} real clips, {scored.counts[0]:,} generated ones")
    for kind, causes in result["skipped"].items():
        result["notes"] += [f"{n:,} {kind} clips left out: {cause}" for cause, n in causes.items()]
    return result


def check(scored: Scored, config: Config, task: Task) -> None:
    """Raises ValueError where too few clips could be read for a score of them."""
    for kind, n in enumerate(scored.counts):
        listed, whose = len(scored.kinds[kind]), f"clips of {task.real}" if kind else "generated clips"
        why = f": {scored.worst(kind)}." if scored.skipped[kind] else "."
        if n < 2:
            raise ValueError(f"{n} of the {listed} {whose} can be used, and a score needs at least two{why}")
        if listed - n > config.data.max_skipped * listed:
            allowed = f"more than data.max_skipped={config.data.max_skipped} allows"
            raise ValueError(f"{listed - n} of the {listed} {whose} cannot be used, {allowed}{why}")

"""`python -m experiments.evaluate fvd|clipsim SIZE [key=value ...]`: score generated clips.

The prompts are the names of the clips in the CSV, which no training reads. Results go to
`<runs>/<size>/evaluate/<metric>.json`.
"""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.video import VideoDataModule
from experiments import build
from experiments.cli import for_people
from experiments.config import Config, load
from experiments.generate import make_cascade
from lightning_modules.metrics.clipsim import CLIPSIM
from lightning_modules.metrics.fvd import FrechetVideoDistance
from models.cascade import MakeAVideo

OUTPUTS = ("decoded", "interpolated", "low", "high")


def prompts(config: Config) -> list[str]:
    """A prompt for each sample, from the names in the CSV of the clips, in its order and again from the start."""
    tables = sorted(Path(config.data.clips).glob("*.csv"))
    if not tables:
        raise FileNotFoundError(f"there is no CSV with the clips' names in '{config.data.clips}' (data.clips).")
    with tables[0].open(newline="", encoding="utf-8") as file:
        names = [row["name"] for row in csv.DictReader(file) if row.get("name")]
    if not names:
        raise ValueError(f"{tables[0]} has no names, so there is nothing to prompt with.")
    return [config.evaluate.prompt.format(names[i % len(names)]) for i in range(config.evaluate.samples)]


def clips_of(config: Config, maker: MakeAVideo, texts: list[str], seeds: list[int]) -> Tensor:
    """Generated clips as uint8 `b 3 f h w`, up to the stage that `evaluate.output` names."""
    output, fps = config.evaluate.output, config.cascade.fps
    if output not in OUTPUTS:
        raise ValueError(f"evaluate.output '{output}' is not one of {', '.join(OUTPUTS)}.")
    embedding = maker.embed(texts, seeds)
    clip = maker.decode(embedding, fps, seeds)
    if output != "decoded":
        clip = maker.interpolate(clip, embedding, fps, seeds)
    if output in ("low", "high"):
        clip = maker.upsample_low(clip, fps * config.cascade.skip, seeds)
    if output == "high":
        clip = maker.upsample_high(clip, seeds)
    clip = clip[:, :, : config.cascade.frames]  # as many frames from every stage: real clips are short
    return ((clip + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def generated(config: Config, maker: MakeAVideo) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches of generated clips with their prompts; sample k has the seed `seed + k`."""
    texts, size = prompts(config), config.evaluate.batch_size
    for start in tqdm(range(0, len(texts), size), desc="generating", file=sys.stderr):
        part = texts[start : start + size]
        yield clips_of(config, maker, part, [config.seed + start + i for i in range(len(part))]).cpu(), part


def real_clips(config: Config, like: Tensor) -> Iterator[Tensor]:
    """Batches of real clips, as many, of the same frames, size and frame rate as the generated ones."""
    settings = config.evaluate
    rate = config.cascade.fps * (1 if settings.output == "decoded" else config.cascade.skip)
    data = VideoDataModule(
        config.data.clips,
        batch_size=settings.batch_size,
        frames=like.shape[2],
        resolution=like.shape[-1],
        curriculum=replace(config.decoder_video.curriculum, f_min=rate, f_max=rate),
        seed=config.seed,
        max_skipped=config.data.max_skipped,
    )
    wanted = settings.samples
    for batch in data.train_dataloader():
        yield batch["video"][:wanted]
        wanted -= len(batch["video"])
        if wanted <= 0:
            return


def evaluate(config: Config, metric: str) -> dict[str, Any]:
    """Generate `evaluate.samples` clips and score them; returns what is written to the JSON file."""
    if metric not in ("fvd", "clipsim"):
        raise ValueError(f"there is no metric '{metric}': it is one of fvd, clipsim.")
    maker = make_cascade(config)
    maker.on_step = None
    if metric == "clipsim":
        clipsim = CLIPSIM(maker.clip)
        for clip, texts in generated(config, maker):
            clipsim.update(clip, texts)
        result = {"clipsim": float(clipsim.compute()), **clipsim.summary()}
    else:
        fvd = FrechetVideoDistance(config.evaluate.i3d or None, config.evaluate.i3d_sha256 or None)
        for clip, _ in generated(config, maker):
            fvd.update(clip, real=False)
        for videos in tqdm(real_clips(config, clip), desc="real clips", file=sys.stderr):
            fvd.update(videos, real=True)
        result = {fvd.name: float(fvd.compute()), **fvd.summary()}
    path = build.run_folder(config, "evaluate") / f"{metric}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2))
    return result


@for_people
def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise ValueError("usage: python -m experiments.evaluate fvd|clipsim SIZE [key=value ...]")
    metric, size, *overrides = arguments
    for key, value in evaluate(load(size, overrides, section="evaluate"), metric).items():
        print(f"{key:<16} {value}")


if __name__ == "__main__":
    main(sys.argv[1:])

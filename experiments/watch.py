"""What watches a stage while it trains: the loggers, and the callbacks that log what a person looks at."""

import json
import os
import subprocess
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from experiments import build
from experiments.benchmarks import names
from experiments.config import Config, VideoStage
from experiments.flops import step_flops
from lightning_modules.callbacks import EMA, DataCounts, Samples
from lightning_modules.csv_logger import MetricsCSV
from lightning_modules.metrics.fvd import FrechetVideoDistance
from lightning_modules.monitor import Clock, NoiseLevels, Speed
from lightning_modules.parallel import first_rank
from lightning_modules.validation import Validation
from lightning_modules.wandb_logger import OneCurve
from models.cascade import MakeAVideo, Stage
from models.clip import Clip
from models.i3d import SHORTEST_CLIP

PROJECT = "make-a-video"
SCORED = ("decoder", "decoder_video")  # the stages that make pictures of nothing but a prompt


def loggers(config: Config, stage: str, first_step: int) -> list[Logger]:
    """metrics.csv and timings.csv in the run folder, and a W&B run, offline unless a key is set; never a prompt."""
    run, trainer = build.run_folder(config, stage), build.section(config, stage).trainer
    online = bool(os.environ.get("WANDB_API_KEY")) and os.environ.get("WANDB_MODE", "online") == "online"
    os.environ.setdefault("WANDB_SILENT", "true")
    metrics = MetricsCSV(run / "metrics.csv", first_step)
    if first_step <= trainer.max_steps:  # what a shorter run measured at its end
        metrics.rows.get(first_step - 1, {}).pop("probe", None)
    wandb = OneCurve(
        run,
        stage,
        metrics.rows,
        trainer.log_every,
        trainer.log_checkpoints,
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=f"{config.size}/{stage}",
        group=config.size,
        id=run_id(run),
        offline=not online,
        config={"stage": stage, "code": code(), **asdict(config)},
    )
    return [metrics, MetricsCSV(run / "timings.csv", first_step, timings=True), wandb]


def run_id(run: Path) -> str:
    """W&B's id of a run folder, kept in it so that a resumed run is one run with one curve."""
    path = run / "wandb_id"
    if not first_rank():
        return ""  # only rank 0 logs
    if not path.exists() or not path.read_text():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(os.urandom(4).hex())
    return path.read_text()


def code() -> dict[str, str]:
    """The versions of the code that trains: of the package, of torch, and the git commit if this is a clone."""
    found = {"version": version("make-a-video"), "torch": torch.__version__}
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return found
    return {**found, "commit": commit.stdout.strip()} if commit.returncode == 0 else found


def callbacks(
    config: Config, stage: str, clip: Clip | None, preview: dict[str, Any], clock: Clock, ema: EMA
) -> list[L.Callback]:
    """The callbacks that log. `preview` is the fixed batch of the pictures."""
    part, run = build.section(config, stage), build.run_folder(config, stage)
    found: list[L.Callback] = [
        Speed(step_flops(config, stage), part.trainer.peak_tflops, clock),
        NoiseLevels(),
        Samples(preview, run / "samples", part.trainer.sample_every, ema, config.seed),
        DataCounts(10 * part.trainer.log_every),
    ]
    if part.trainer.validate_every and stage in SCORED:
        assert clip is not None
        found.append(validation(config, stage, clip, ema))
    return found


def validation(config: Config, stage: str, clip: Clip, ema: EMA) -> Validation:
    """The scores of D and D^t at fixed prompts, against clips of `data.validation`, or of the training set if none."""
    part = build.section(config, stage)
    held_out = replace(config, data=replace(config.data, clips=config.data.validation or config.data.clips))
    batch = build.datamodule(held_out, stage, clip).preview(part.trainer.validate)
    n = len(batch["key"])
    texts = fixed_prompts(config, stage)[:n]
    texts = [texts[i % len(texts)] for i in range(n)] if texts else []
    if texts:
        batch["image_embedding"] = embeddings(config, clip, texts)
    fvd = None
    if n > 1 and any(name.startswith("fvd") for name in scores_of(config, stage)):
        fvd = FrechetVideoDistance(config.evaluate.i3d or None, config.evaluate.i3d_sha256 or None)
    folder = build.run_folder(config, stage) / "prompted"
    if texts:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prompts.json").write_text(json.dumps(texts, indent=2))
    where = "validation" if config.data.validation else "preview"
    return Validation(batch, folder, part.trainer.validate_every, ema, config.seed, where, clip, texts, fvd)


def fixed_prompts(config: Config, stage: str) -> list[str]:
    """The prompts of the scores, from the names of clips; none without names, or while P has no weights."""
    try:
        build.weights_path(config, "prior")
        return names(config.data.validation or config.data.clips, config.evaluate.prompt)
    except (FileNotFoundError, ValueError):
        return []


def scores_of(config: Config, stage: str) -> list[str]:
    """The names of a stage's scores, without where they are of: FVD is of clips, long enough for its network."""
    part = build.section(config, stage)
    if stage not in SCORED or not part.trainer.validate_every:
        return []
    scores = ["clipsim"] if fixed_prompts(config, stage) else []
    if isinstance(part, VideoStage) and part.frames >= SHORTEST_CLIP and part.trainer.validate > 1:
        scores.append("fvd" if config.evaluate.i3d else "fvd_random")
    return scores


def embeddings(config: Config, clip: Clip, texts: list[str]) -> torch.Tensor:
    """CLIP image embeddings `n d` of unit norm that P makes of the prompts, with the seeds 0 ... n - 1."""
    net = build.network(config, "prior")
    net.load_state_dict(build.weights(config, "prior"))
    prior = Stage(net, build.diffusion(config, "prior"))
    others = (prior,) * 4  # embedding a prompt asks none of the other networks
    maker = MakeAVideo(clip, prior, *others, config=config.cascade, device=build.device())
    embedding = maker.embed(texts, list(range(len(texts)))).float().cpu()
    del maker, prior, others
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # training needs the room
    return torch.nn.functional.normalize(embedding.clone(), dim=-1)

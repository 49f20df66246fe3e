"""`python -m experiments.train STAGE SIZE [key=value ...]`: train one stage into its run folder.

A run folder `runs/<size>/<stage>/` holds config.yaml, checkpoints/, metrics.csv, samples/, wandb/ and, once the
stage has finished, weights.safetensors (averaged) and summary.json. Run again, an interrupted stage goes on
from its last checkpoint.
"""

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from safetensors.torch import save_file

from experiments import build
from experiments.cli import for_people
from experiments.config import Config, load, save
from experiments.plan import warn
from lightning_modules.callbacks import EMA, ClipGradients, DataCounts, Probe, Samples, StepSeed
from lightning_modules.csv_logger import MetricsCSV


def train(config: Config, stage: str) -> dict[str, Any]:
    """Train a stage to its last step, or go on from its last checkpoint.

    Returns:
        The summary that is written to the run folder: parameters, steps, seconds, first and last loss.

    Raises:
        FileNotFoundError: an earlier stage has no weights yet; names the command that makes them.
        ValueError: the config or the data are not usable.
    """
    warn(config, stage)
    part, recipe, run = build.section(config, stage), build.STAGES[stage], build.run_folder(config, stage)
    clip = build.load_clip(config) if recipe.needs_clip else None
    earlier = build.weights(config, recipe.grows_from) if recipe.grows_from else None
    torch.manual_seed(config.seed)
    net = build.network(config, stage)
    if earlier is not None:
        net.load_image_weights(earlier)  # type: ignore[operator]
    if part.trainer.compile:
        net.compile()
    module = build.module(config, stage, net, clip)
    data = build.datamodule(config, stage, clip)
    preview = data.preview(part.trainer.preview)

    last = run / "checkpoints" / "last.ckpt"
    done = steps_done(last, module, part.trainer.max_steps) if last.exists() else 0
    save(config, run / "config.yaml")
    (run / "summary.json").unlink(missing_ok=True)
    ema = EMA(part.trainer.ema_decay)
    probe = Probe(preview, ema, config.seed)
    progress = Progress(recipe.title)
    trainer = L.Trainer(
        accelerator=part.trainer.accelerator,
        devices=part.trainer.devices,
        strategy=part.trainer.strategy,
        precision=build.precision(part.trainer.precision),  # type: ignore[arg-type]
        max_steps=part.trainer.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=part.trainer.accumulate,
        logger=loggers(config, stage, run, done),
        log_every_n_steps=part.trainer.log_every,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the data modules split the order themselves
        default_root_dir=run,
        callbacks=[
            StepSeed(config.seed),
            ClipGradients(part.trainer.clip_gradients),
            ema,
            Samples(preview, run / "samples", part.trainer.sample_every, ema, config.seed),
            DataCounts(10 * part.trainer.log_every),
            probe,
            progress,
            ModelCheckpoint(
                run / "checkpoints",
                filename="{step:08d}",
                auto_insert_metric_name=False,
                every_n_train_steps=part.trainer.checkpoint_every,
                save_last="link",
            ),
        ],
    )
    before = seconds_so_far(run)
    start = time.time()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=last if done else None, weights_only=True)
    except SystemExit:
        raise KeyboardInterrupt from None  # what Lightning makes of Ctrl-C
    finally:
        if trainer.is_global_zero:
            (run / "seconds.json").write_text(json.dumps(before + time.time() - start))
        for logger in trainer.loggers:
            logger.finalize("success" if trainer.global_step >= trainer.max_steps else "interrupted")
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()
    ema.swap(net)
    result = {
        "stage": stage,
        "parameters": sum(p.numel() for p in net.parameters()),
        "steps": trainer.global_step,
        "seconds": round(seconds_so_far(run), 1),
        "first_loss": probe.values[0],
        "last_loss": probe.values[-1],
        "skipped": dict(data.skipped),
    }
    if trainer.is_global_zero:
        state = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
        whole(run / "weights.safetensors", lambda path: save_file(state, path, {"stage": stage, "size": config.size}))
        whole(run / "summary.json", lambda path: path.write_text(json.dumps(result, indent=2)))
    return result


class Progress(TQDMProgressBar):
    """A bar for the stage, over steps, with loss and rate; it opens at the step a resumed run starts from."""

    def __init__(self, title: str):
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else 50)
        self.title = title

    @property
    def train_description(self) -> str:
        return self.title

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.train_progress_bar.reset(total=trainer.max_steps)
        self.train_progress_bar.initial = self.train_progress_bar.n = trainer.global_step

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """The epoch is endless: the bar keeps its total of steps."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar, step = self.train_progress_bar, trainer.global_step
        if step % self.refresh_rate == 0 or step == trainer.max_steps:
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, pl_module))
            bar.refresh()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        loss = trainer.progress_bar_metrics.get("loss")
        return {} if loss is None else {"loss": f"{float(loss):.3f}"}


def loggers(config: Config, stage: str, run: Path, first_step: int) -> list[Logger]:
    """metrics.csv in the run folder and a W&B run of the same name, offline unless a key is set; never a prompt."""
    online = bool(os.environ.get("WANDB_API_KEY")) and os.environ.get("WANDB_MODE", "online") == "online"
    os.environ.setdefault("WANDB_SILENT", "true")
    wandb = WandbLogger(
        project="make-a-video",
        name=f"{config.size}/{stage}",
        group=config.size,
        id=run_id(run),
        resume="allow",
        save_dir=run,
        offline=not online,
    )
    return [MetricsCSV(run / "metrics.csv", first_step), wandb]


def run_id(run: Path) -> str:
    """W&B's id of a run folder, kept in it so that a resumed run is one run with one curve."""
    path = run / "wandb_id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(os.urandom(4).hex())
    return path.read_text()


def steps_done(checkpoint: Path, module: L.LightningModule, max_steps: int) -> int:
    """Steps that a checkpoint has behind it.

    Raises:
        ValueError: it is of another network, or has trained more steps than are asked for.
    """
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    run = checkpoint.parent.parent
    shapes = {key: value.shape for key, value in state["state_dict"].items()}
    if shapes != {key: value.shape for key, value in module.state_dict().items()}:
        raise ValueError(f"{run} holds a run of another network; remove that folder, or write elsewhere with runs=...")
    if state["global_step"] > max_steps:
        raise ValueError(
            f"{run} has trained {state['global_step']} steps, more than trainer.max_steps={max_steps}; "
            "remove that folder to train anew, or write elsewhere with runs=..."
        )
    return state["global_step"]


def seconds_so_far(run: Path) -> float:
    """Seconds that earlier sittings of a run have trained."""
    path = run / "seconds.json"
    return float(json.loads(path.read_text())) if path.exists() else 0.0


def whole(path: Path, write: Any) -> None:
    """Write a file whole or not at all: beside its place first, then moved there."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def quiet() -> None:
    """Silence what Lightning says on every start and no one can act on."""
    import logging

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Experiment logs directory.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory.*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*mid-epoch.*")
    warnings.filterwarnings("ignore", message=".*treespec.*")


@for_people
def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise ValueError("usage: python -m experiments.train STAGE SIZE [key=value ...]")
    stage, size, *overrides = arguments
    if stage not in build.STAGES:
        raise ValueError(f"there is no stage '{stage}': it is one of {', '.join(build.STAGES)}.")
    quiet()
    config = load(size, overrides, section=stage)
    run = build.run_folder(config, stage)
    result = train(config, stage)
    print(f"{build.STAGES[stage].title}: {result['steps']} steps, loss {result.get('first_loss', float('nan')):.3f}"
          f" -> {result.get('last_loss', float('nan')):.3f}, weights in {run / 'weights.safetensors'}")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])

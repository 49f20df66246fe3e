"""`python -m experiments.train STAGE SIZE [key=value ...]`: train one stage into its run folder.

A run folder `runs/<size>/<stage>/` holds config.yaml, checkpoints/, metrics.csv, timings.csv, samples/, wandb/ and,
once the stage has finished, weights.safetensors (averaged) and summary.json. Run again, an interrupted stage goes on
from its last checkpoint.
"""

import json
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import WandbLogger
from safetensors import SafetensorError
from safetensors.torch import save_file

from experiments import build, watch
from experiments.cli import for_people
from experiments.config import Config, load, save
from experiments.plan import warn
from lightning_modules import parallel
from lightning_modules.callbacks import EMA, ClipGradients, ConfiguredRates, Probe, StepSeed
from lightning_modules.checkpoint import Checkpoints, read
from lightning_modules.monitor import Clock
from lightning_modules.whole import whole


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

    saver = Checkpoints(
        run / "checkpoints",
        part.trainer.checkpoint_every,
        part.trainer.keep_checkpoints,
        {"stage": stage, "size": config.size},
    )
    last, done = resume(saver, module, part.trainer.max_steps)
    if parallel.first_rank():
        save(config, run / "config.yaml")
        (run / "summary.json").unlink(missing_ok=True)
    precision = build.precision(part.trainer.precision)
    ema = EMA(part.trainer.ema_decay)
    probe = Probe(preview, ema, config.seed)
    progress, clock = Progress(recipe.title), Clock()
    trainer = L.Trainer(
        accelerator=part.trainer.accelerator,
        devices=part.trainer.devices,
        num_nodes=parallel.nodes(),
        strategy=parallel.strategy(build.strategy(part), precision),
        precision=precision,  # type: ignore[arg-type]
        max_steps=part.trainer.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=part.trainer.accumulate,
        # the row of this step has what callbacks logged when the checkpoint was written, and is completed
        logger=watch.loggers(config, stage, done + 1),
        profiler=clock,
        log_every_n_steps=part.trainer.log_every,
        enable_model_summary=False,
        use_distributed_sampler=False,  # the data modules split the order themselves
        default_root_dir=run,
        plugins=[saver.io],
        callbacks=[
            StepSeed(config.seed),
            ConfiguredRates(),
            ClipGradients(part.trainer.clip_gradients, part.trainer.max_nonfinite, ema),
            ema,
            *watch.callbacks(config, stage, clip, preview, clock, ema),
            probe,
            progress,
            saver,
        ],
    )
    before = seconds_so_far(run)
    start = time.time()
    try:
        with saver.listening():
            trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
    except SystemExit:
        if saver.signal is None:
            raise KeyboardInterrupt from None  # what Lightning makes of Ctrl-C
    except FloatingPointError as error:
        raise RuntimeError(f"{error} The last good checkpoint is {saver.newest}.") from None
    finally:
        seconds = before + time.time() - start
        if trainer.is_global_zero:
            with suppress(OSError), whole(run / "seconds.json") as path:
                path.write_text(json.dumps(seconds))
        for logger in trainer.loggers:
            logger.finalize("success" if trainer.global_step >= trainer.max_steps else "interrupted")
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()
    if saver.signal is not None and trainer.global_step < trainer.max_steps:
        stopped(saver, trainer)
    ema.swap(net)
    result = {
        "stage": stage,
        "parameters": sum(p.numel() for p in net.parameters()),
        "steps": trainer.global_step,
        "seconds": round(seconds, 1),
        "first_loss": probe.values[0],
        "last_loss": probe.values[-1],
        "skipped": dict(data.skipped),
    }
    state = {k: v.detach().cpu().contiguous() for k, v in parallel.gathered(net.state_dict()).items()}
    if trainer.is_global_zero:
        with whole(run / "weights.safetensors") as path:
            export(state, path, {"stage": stage, "size": config.size})
        with whole(run / "summary.json") as path:
            path.write_text(json.dumps(result, indent=2))
    if saver.signal is not None:
        stopped(saver, trainer)
    return result


def stopped(saver: Checkpoints, trainer: L.Trainer) -> NoReturn:
    """Leave with the status that a shell gives a process ended by this signal: 128 + its number."""
    number = signal.Signals(saver.signal or 0)
    if trainer.is_global_zero:
        print(
            f"stopped by {number.name} after step {trainer.global_step}; run the same command again to go on from "
            f"{saver.newest}.",
            file=sys.stderr,
        )
    sys.exit(128 + number)


def export(state: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write weights; safetensors has an error of its own for a full disk."""
    try:
        save_file(state, path, metadata)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from None


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


def resume(saver: Checkpoints, module: L.LightningModule, max_steps: int) -> tuple[Path | None, int]:
    """The checkpoint to go on from and the steps it has behind it; (None, 0) where there is none.

    Raises:
        ValueError: it is of another schema, stage, size or network, or has trained more steps than are asked for.
    """
    run = saver.folder.parent
    try:
        path, state = read(saver.folder, saver.run)
    except FileNotFoundError:
        return None, 0
    shapes = {key: value.shape for key, value in state["state_dict"].items()}
    if shapes != {key: value.shape for key, value in module.state_dict().items()}:
        raise ValueError(f"{run} holds a run of another network; remove that folder, or write elsewhere with runs=...")
    if state["global_step"] > max_steps:
        raise ValueError(
            f"{run} has trained {state['global_step']} steps, more than trainer.max_steps={max_steps}; "
            "remove that folder to train anew, or write elsewhere with runs=..."
        )
    return path, state["global_step"]


def seconds_so_far(run: Path) -> float:
    """Seconds that earlier sittings of a run have trained."""
    path = run / "seconds.json"
    return float(json.loads(path.read_text())) if path.exists() else 0.0


def quiet() -> None:
    """Silence what Lightning says on every start and no one can act on."""
    import logging

    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Experiment logs directory.*")
    warnings.filterwarnings("ignore", message=".*mid-epoch.*")
    warnings.filterwarnings("ignore", message=".*treespec.*")
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped module.*view tensor.*")  # nothing writes into it


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
    if not parallel.first_rank():
        return
    print(f"{build.STAGES[stage].title}: {result['steps']} steps, loss {result.get('first_loss', float('nan')):.3f}"
          f" -> {result.get('last_loss', float('nan')):.3f}, weights in {run / 'weights.safetensors'}")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])

"""What every stage's training has in common, as Lightning callbacks."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_modules.media import strip, write_mp4, write_png

log = logging.getLogger(__name__)


class StepSeed(L.Callback):
    """Seeds the global generator of every training step by (seed, batch number, rank).

    A resumed run draws what the uninterrupted one would have drawn: times, noise, dropout, masks.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        key = f"{self.seed}/{batch_idx}/{trainer.global_rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)


class ClipGradients(L.Callback):
    """Limits the norm of all gradients together, and logs what it was.

    In place of the Trainer's own, which refuses a fused optimiser in mixed precision.
    """

    def __init__(self, limit: float):
        self.limit = limit

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        trained = [p for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.limit or float("inf"))
        pl_module.log("gradient_norm", norm)


class EMA(L.Callback):
    """Exponential moving average of the parameters of `pl_module.net`.

    The decay is warmed up, min(decay, (1 + n) / (10 + n)), so that the average is of use early. It goes into the
    checkpoint, and takes the place of the weights while pictures are made and in the exported file.
    """

    def __init__(self, decay: float):
        self.decay, self.updates = decay, 0
        self.average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = dict(pl_module.net.named_parameters())  # type: ignore[union-attr, operator]
        restored = self.average
        self.average = {
            k: (restored[k] if k in restored else p).detach().clone().to(p.device) for k, p in parameters.items()
        }

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step <= self.updates:  # a batch of an accumulation that is not complete
            return
        self.updates = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [p.detach() for p in pl_module.net.parameters()]  # type: ignore[union-attr, operator]
        torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)

    def swap(self, net: torch.nn.Module) -> None:
        """Exchange weights and average; a second call exchanges them back."""
        for key, parameter in net.named_parameters():
            parameter.data, self.average[key] = self.average[key], parameter.data

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.updates = state["average"], state["updates"]


class Samples(L.Callback):
    """Pictures of a fixed batch with fixed noise, by the averaged weights, while a stage trains.

    Writes `samples/step_00001000.png`, a row for each picture of the module's `sample`, and for clips an mp4
    beside it; W&B gets the files by path.
    """

    def __init__(self, batch: dict[str, Any], folder: Path, every: int, ema: EMA, seed: int):
        self.batch, self.folder, self.every, self.ema, self.seed = batch, folder, every, ema, seed

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
        if not due or not trainer.is_global_zero or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        self.ema.swap(pl_module.net)  # type: ignore[arg-type]
        pl_module.eval()
        torch.manual_seed(self.seed)
        moved = {k: v.to(pl_module.device) if isinstance(v, Tensor) else v for k, v in self.batch.items()}
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            pictures = pl_module.sample(moved)  # type: ignore[operator]
        pl_module.train()
        self.ema.swap(pl_module.net)  # type: ignore[arg-type]
        if pictures:
            self.save(trainer, {k: v for k, v in pictures.items() if v.shape[1] == 3}, step)

    def save(self, trainer: L.Trainer, pictures: dict[str, Tensor], step: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = list(pictures.values())
        path = self.folder / f"step_{step:08d}.png"
        write_png(path, torch.cat([strip(row) for row in rows], dim=1))
        media = {"image": path}
        if rows[0].ndim == 5 and rows[0].shape[2] > 1:
            media["video"] = path.with_suffix(".mp4")
            write_mp4(media["video"], torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2), fps=8)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("samples", [str(path)], step=step)
                if "video" in media:
                    logger.log_video("clips", [str(media["video"])], step=step, format=["mp4"])


class Probe(L.Callback):
    """The loss of a fixed batch with fixed times and noise, before the first step and after the last.

    The loss of a step jumps with its times, noise and frame rates, and the curriculum makes clips harder as it
    goes; this one measures the network alone: fresh weights, then averaged ones. Logged as `probe`.
    """

    def __init__(self, batch: dict[str, Any], ema: EMA, seed: int, draws: int = 8):
        self.batch, self.ema, self.seed, self.draws = batch, ema, seed, draws
        self.values: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.values:
            self.values = [self.measure(trainer, pl_module)]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.ema.swap(pl_module.net)  # type: ignore[arg-type]
        self.values = [self.values[0], self.measure(trainer, pl_module)]
        self.ema.swap(pl_module.net)  # type: ignore[arg-type]

    @torch.no_grad()
    def measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> float:
        moved = {k: v.to(pl_module.device) if isinstance(v, Tensor) else v for k, v in self.batch.items()}
        pl_module.eval()
        total = 0.0
        for draw in range(self.draws):
            torch.manual_seed(self.seed + draw)
            with trainer.precision_plugin.forward_context():
                total += float(pl_module.loss(moved))  # type: ignore[operator]
        pl_module.train()
        for logger in trainer.loggers:
            logger.log_metrics({"probe": total / self.draws}, step=trainer.global_step)
        return total / self.draws

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = list(state["values"])


class DataCounts(L.Callback):
    """Logs what the data module counts: samples that a filter took, those that could not be read, and for clips the
    achieved frame rates; every `every` steps those that could not be read by cause, of all ranks, with a line in the
    log, and to W&B the histogram of rates."""

    CAUSES = 20  # that get a metric of their own

    def __init__(self, every: int):
        self.every, self.step, self.told = every, 0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step
        taken = getattr(trainer.datamodule, "filtered", {})  # type: ignore[attr-defined]
        for logger in trainer.loggers if taken else ():
            logger.log_metrics({f"data/filtered/{name}": float(n) for name, n in taken.items()}, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        due = trainer.global_step > self.step and trainer.global_step % self.every == 0  # once, if a step has batches
        self.step = trainer.global_step
        if due and hasattr(data, "gather"):
            data.gather()
            self.log_causes(trainer, data)
        if getattr(data, "skipped", None):
            pl_module.log("data/skipped", float(sum(data.skipped.values())))
        rates = getattr(data, "rates", None)
        if not rates:
            return
        pl_module.log("data/fps", batch["fps"].mean())  # of this batch: the same numbers after a resume
        if due:
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    bins = np.arange(min(rates), max(rates) + 2)
                    counts = np.array([rates[fps] for fps in bins[:-1]])
                    histogram = wandb.Histogram(np_histogram=(counts, bins - 0.5))
                    logger.experiment.log({"data/rates": histogram, "trainer/global_step": trainer.global_step})
            rates.clear()  # the next histogram shows how far the curriculum has come since

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "gather"):
            data.gather()
            self.log_causes(trainer, data)

    def log_causes(self, trainer: L.Trainer, data: Any) -> None:
        total = data.skipped.total()
        if total == self.told or not trainer.is_global_zero:
            return
        self.told = total
        log.warning("%d samples could not be read so far. %s.", total, data.worst())
        causes = {f"data/skipped/{cause}": float(n) for cause, n in data.skipped.most_common(self.CAUSES)}
        for logger in trainer.loggers:
            logger.log_metrics(causes, trainer.global_step)

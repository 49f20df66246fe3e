"""What every stage's training has in common, as Lightning callbacks."""

import hashlib
import logging
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from lightning_modules.media import strip, write_mp4, write_png
from lightning_modules.parallel import gathered, local, split, whole

log = logging.getLogger(__name__)


class StepSeed(L.Callback):
    """Seeds the global generator of every training step by (seed, batch number, rank).

    A resumed run draws what the uninterrupted one would have drawn: dropout, and all that has no seed of its sample
    (`lightning_modules.draws`).
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        key = f"{self.seed}/{batch_idx}/{trainer.global_rank}".encode()
        torch.manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)


class ClipGradients(L.Callback):
    """Limits the norm of all gradients together, logs what it was, and skips steps that are not finite.

    In place of the Trainer's own, which refuses a fused optimiser in mixed precision.

    Where the loss of a batch or the gradient is infinite or nan, weights, optimiser state and average stay as they
    are. The step still counts, and the learning rate's schedule and the data go on: both follow the number of the
    step. `skipped_steps` counts such steps, also across a resume. Ranks agree, as the norm is that of the gradients
    reduced over them. Looking at the norm waits for the GPU once a step.

    Raises FloatingPointError for more than `max_nonfinite` in a row.
    """

    def __init__(self, limit: float, max_nonfinite: int, ema: "EMA"):
        self.limit, self.max_nonfinite, self.ema = limit, max_nonfinite, ema
        self.skipped = self.in_a_row = 0

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # A loss that is not finite can have a finite gradient, and that of one rank or of one batch of an accumulation
        # must reach the norm: 0 where it is finite, else nan.
        poison = 0 * loss.detach()
        loss.register_hook(lambda gradient: gradient + poison)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        trained = [p for p in pl_module.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.clip_grad_norm_(trained, self.limit or float("inf")))
        if norm.isfinite():
            self.in_a_row = 0
        else:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            optimizer.zero_grad()  # an optimiser leaves parameters without gradient alone, and their state
            self.ema.updates = trainer.global_step + 1  # the average counts this step as done
        pl_module.log("gradient_norm", norm)
        pl_module.log("skipped_steps", float(self.skipped))
        if self.in_a_row > self.max_nonfinite:
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row, up to step {trainer.global_step + 1}, had a loss or a gradient that "
                "is infinite or nan, more than trainer.max_nonfinite allows: lower optim.lr, or look at the data."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


class ConfiguredRates(L.Callback):
    """A resumed run goes on with the rates of its config, which may have changed since its checkpoint was written."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        options: Any = pl_module.optim
        schedule: Any = trainer.lr_scheduler_configs[0].scheduler
        schedule.base_lrs = [options.lr] * len(schedule.base_lrs)
        for group, factor in zip(trainer.optimizers[0].param_groups, schedule.lr_lambdas, strict=True):
            group |= dict(lr=options.lr * factor(schedule.last_epoch), initial_lr=options.lr, eps=options.eps)
            group |= dict(betas=(options.beta1, options.beta2), weight_decay=options.weight_decay)


class EMA(L.Callback):
    """Exponential moving average of the parameters of `pl_module.net`.

    The decay is warmed up, min(decay, (1 + n) / (10 + n)), so that the average is of use early. It goes into the
    checkpoint, and takes the place of the weights while pictures are made and in the exported file. It is split over
    ranks where the weights are; in the checkpoint it is whole.
    """

    def __init__(self, decay: float):
        self.decay, self.updates = decay, 0
        self.average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parameters = dict(pl_module.net.named_parameters())  # type: ignore[union-attr, operator]
        old = self.average
        self.average = {k: split(old[k], p) if k in old else p.detach().clone() for k, p in parameters.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step <= self.updates:  # a batch of an accumulation that is not complete
            return
        self.updates = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [local(p.detach()) for p in pl_module.net.parameters()]  # type: ignore[union-attr, operator]
        torch._foreach_lerp_([local(a) for a in self.average.values()], parameters, 1 - decay)

    @torch.no_grad()
    def swap(self, net: torch.nn.Module) -> None:
        """Exchange weights and average in place; a second call exchanges them back."""
        for key, parameter in net.named_parameters():
            weights, average = local(parameter), local(self.average[key])
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        return {"average": gathered(self.average), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Under FSDP the weights are split by now, under other strategies `on_fit_start` comes later.
        made, self.updates = self.average, state["updates"]
        self.average = {k: split(v, made[k]) if k in made else v for k, v in state["average"].items()}


class Samples(L.Callback):
    """Pictures of a fixed batch with fixed noise, by the averaged weights, while a stage trains.

    Writes `samples/step_00001000.png`, a row for each picture of the module's `sample`, and for clips an mp4
    beside it; W&B gets the files by path.
    """

    image, video = "samples", "clips"  # W&B's names for them

    def __init__(self, batch: dict[str, Any], folder: Path, every: int, ema: EMA, seed: int):
        self.batch, self.folder, self.every, self.ema, self.seed = batch, folder, every, ema, seed

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
        if not due or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # On every rank, for under FSDP a forward pass is an affair of all; rank 0 writes.
        self.ema.swap(pl_module.net)  # type: ignore[arg-type]
        pl_module.eval()
        torch.manual_seed(self.seed)
        moved = {k: v.to(pl_module.device) if isinstance(v, Tensor) else v for k, v in self.batch.items()}
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            pictures = pl_module.sample(moved)  # type: ignore[operator]
        pl_module.train()
        self.ema.swap(pl_module.net)  # type: ignore[arg-type]
        if pictures and trainer.is_global_zero:
            try:
                self.save(trainer, {k: v for k, v in pictures.items() if v.shape[1] == 3}, step)
            except OSError as error:
                warnings.warn(f"the pictures of step {step} could not be written ({error.strerror}).", stacklevel=2)

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
                logger.log_image(self.image, [str(path)], step=step)
                if "video" in media:
                    logger.log_video(self.video, [str(media["video"])], step=step, format=["mp4"])


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

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not in on_train_end, which comes after the last checkpoint: a run killed in between would not come here again.
        if trainer.global_step < trainer.max_steps:
            return
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
    """Logs what the data module counts.

    At the start the share of samples that the filters left (`data/kept`), and how many each took; then how many samples
    could not be read, in all (`data/skipped`) and by cause; and for clips the achieved frame rates, and to W&B their
    histogram. Every `every` steps the counts of all ranks are brought together, with a line in the log.
    """

    CAUSES = 20  # that get a metric of their own

    def __init__(self, every: int):
        self.every, self.told = every, 0
        self.rates: Counter[int] = Counter()  # since the last histogram

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step:
            return  # the same filters have taken the same samples as when the run began
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        left, taken = sum(map(len, data.sources())), data.filtered
        values = {"data/kept": left / (left + sum(taken.values()))}
        values |= {f"data/filtered/{name}": float(n) for name, n in taken.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        step, whole = trainer.global_step, (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = whole and (step % self.every == 0 or step == trainer.max_steps)
        if due:
            data.gather()
            self.tell(trainer, data)
        pl_module.log("data/skipped", float(data.skipped.total()))
        for cause, n in data.skipped.most_common(self.CAUSES):
            pl_module.log(f"data/skipped_by_cause/{as_key(cause)}", float(n))
        if not hasattr(data, "rates"):
            return
        # Of this batch: the same numbers after a resume. Pictures, in joint training, have no rate, and a value that is
        # not replaced would be logged again.
        pl_module.log("data/fps", batch["fps"].mean() if "fps" in batch else float("nan"))
        self.rates += data.rates
        data.rates.clear()
        if self.rates and due:
            bins = np.arange(min(self.rates), max(self.rates) + 2)
            counts = np.array([self.rates[fps] for fps in bins[:-1]])
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    histogram = wandb.Histogram(np_histogram=(counts, bins - 0.5))
                    logger.log_metrics({"data/rates": histogram}, step)  # type: ignore[dict-item]
            self.rates.clear()  # the next histogram shows how far the curriculum has come since

    def tell(self, trainer: L.Trainer, data: Any) -> None:
        total = data.skipped.total()
        if total != self.told and trainer.is_global_zero:
            log.warning("%d samples could not be read so far. %s.", total, data.worst())
        self.told = total

    def state_dict(self) -> dict[str, Any]:
        return {"rates": dict(self.rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rates = Counter(state["rates"])


def as_key(cause: str) -> str:
    """A cause as a metric's name: words joined by underscores."""
    return re.sub(r"[^A-Za-z0-9]+", "_", cause).strip("_")[:80]

"""Checkpoints: written whole or not at all, at the interval and on a signal, and checked before a run goes on."""

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from lightning_modules.csv_logger import MetricsCSV
from lightning_modules.whole import whole

SCHEMA = 1  # of what a checkpoint holds; raise it when an older one can no longer be gone on from
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class WholeFile(TorchCheckpointIO):
    """Writes a checkpoint beside its place, syncs it to disk, and moves it there.

    Lightning's own holds the whole file in memory twice and writes it to /tmp first, from where it is copied if that
    is another disk. A full disk is kept in `error` instead of raised, as other ranks wait for this one after a write.
    """

    error: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.error = None
        try:
            with whole(Path(path)) as part:
                write(checkpoint, part)
        except OSError as error:
            self.error = error


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """torch.save that raises OSError where the disk is full: torch hides it behind an error of its own."""
    try:
        with path.open("wb") as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


class Checkpoints(Checkpoint):
    """Saves `folder/00001000.ckpt` every `every` steps, at the last step, and at the step in which a signal comes.

    `last.ckpt` is a link to the newest and always loads. SIGTERM and SIGUSR1 (preemption) end the step, save and stop
    training; `signal` says which it was. On several ranks all of them stop, whichever was signalled. When the disk is
    full, training goes on and the next interval tries again: what is in memory is worth more than a stop.

    Args:
        keep: how many of the newest stay; while one is written there is one more.
        run: what is written into each checkpoint beside the schema, for `read` to compare: stage and size.
    """

    def __init__(self, folder: Path, every: int, keep: int, run: dict[str, str]):
        self.folder, self.every, self.keep, self.run = folder, every, max(1, keep), run
        self.io = WholeFile()
        self.signal: int | None = None
        self.step = 0

    @property
    def path(self) -> Path:
        """Of the checkpoint of this step."""
        return self.folder / f"{self.step:08d}.ckpt"

    @property
    def newest(self) -> str:
        """The path of the newest checkpoint, for a sentence."""
        return str(next(iter(checkpoints(self.folder)), "none"))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within this context SIGTERM and SIGUSR1 are noted in `signal` and end training after the step."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: setattr(self, "signal", number))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning has set handlers by now: of SIGTERM, which talks to other ranks in the middle of a step, and, under
        # SLURM, of SIGUSR1, which saves in the middle of a step if it finds no handler.
        self.listen()
        self.step = trainer.global_step
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob("*.part"):  # of a run killed while it wrote
                part.unlink()
            for damaged in checkpoints(self.folder):  # passed over by `read`: these steps are taken again
                if damaged.name > self.path.name:
                    damaged.unlink()
            if self.path.exists():
                self.link()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:  # a batch of an accumulation that is not complete
            return
        self.step = trainer.global_step
        stop = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        if stop or self.step % self.every == 0 or self.step >= trainer.max_steps:
            if gather := getattr(trainer.datamodule, "gather", None):  # type: ignore[attr-defined]
                gather()  # the counts of all ranks
            self.save(trainer)
        if stop:
            self.signal = self.signal or signal.SIGTERM  # another rank's
            trainer.should_stop = True

    def save(self, trainer: L.Trainer) -> None:
        """Save a checkpoint of this step, point `last.ckpt` at it, and remove the oldest; a warning if that fails."""
        log_now(trainer)
        trainer.save_checkpoint(self.path)
        if not trainer.is_global_zero:
            return
        error = self.io.error
        if error is None:
            try:
                self.link()
                for old in checkpoints(self.folder)[self.keep :]:
                    old.unlink()
                for logger in trainer.loggers:
                    logger.after_save_checkpoint(self)  # type: ignore[arg-type]
            except OSError as linking:
                error = linking
        if error is not None:
            warnings.warn(
                f"the checkpoint of step {self.step} could not be written ({error.strerror}); the last good one is "
                f"{self.newest}. Unless it is being stopped, training goes on and tries again in {self.every} steps.",
                stacklevel=2,
            )

    def link(self) -> None:
        """Point `last.ckpt` at the checkpoint of this step."""
        with whole(self.folder / "last.ckpt") as part:
            part.symlink_to(self.path.name)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = {"schema": SCHEMA, **self.run}


def log_now(trainer: L.Trainer) -> None:
    """Write this step's row of metrics.csv.

    Lightning logs a step after its last hook, so a kill right after a checkpoint would lose the row: the step is not
    taken again. The row that Lightning writes then is the same.
    """
    connector = trainer._logger_connector
    if connector.should_update_logs:
        row = {key: float(value) for key, value in connector.metrics["log"].items()}
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.log_metrics(row, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first. Each is whole: what is being written has another name."""
    return sorted(folder.glob("[0-9]*.ckpt"), reverse=True)


def read(folder: Path, run: dict[str, str]) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a folder that can be read, and what it holds (tensors mapped from the file).

    A damaged file is named in a warning and passed over for the one before it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another schema, stage or size than `run` says, or none can be read.
    """
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"there is no checkpoint in {folder}.")
    for path in found:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            schema = state.get("run", {}).get("schema", 0)
        except Exception as error:  # a broken file raises every kind
            cause = (str(error).splitlines() or [type(error).__name__])[0][:100]
            warnings.warn(f"{path} cannot be read ({cause}); trying the checkpoint before it.", stacklevel=2)
            continue
        if schema != SCHEMA:
            raise ValueError(
                f"{path} has schema {schema} and this version reads {SCHEMA}: go on with the version that wrote it, or "
                f"remove {folder.parent} to train anew."
            )
        for key, wanted in run.items():
            its_own = state["run"].get(key)
            if its_own != wanted:
                raise ValueError(
                    f"{path} is of {key} '{its_own}', not '{wanted}'; remove {folder.parent}, or write elsewhere with "
                    "runs=..."
                )
        return path, state
    raise ValueError(f"no checkpoint in {folder} can be read; remove {folder.parent} to train anew.")

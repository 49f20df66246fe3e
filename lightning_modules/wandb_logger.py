"""A W&B run that stays one curve across interruptions, and its file read back."""

import json
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

from lightning_modules.checkpoint import Checkpoints


class OneCurve(WandbLogger):
    """Every step goes to W&B once, in order, under its own number.

    A killed run takes the steps after its last checkpoint again, with the same numbers. W&B has them already, and
    keeps what it has: they are not sent twice. What a kill took from W&B's file but not from metrics.csv is sent first.

    Args:
        folder: the run folder, in which `wandb/` lies.
        prefix: stands before every key, `decoder/loss`: so each stage of a project has a section of its own.
        missed: rows of metrics.csv by step, from before the checkpoint that the run resumes from.
        every: Lightning's `log_every_n_steps`: a step whose losses it does not log is whole without them.
        log_checkpoints: send checkpoints as artifacts.
        options: of Lightning's WandbLogger.
    """

    LOGGER_JOIN_CHAR = "/"

    def __init__(
        self,
        folder: Path,
        prefix: str,
        missed: Mapping[int, Mapping[str, str]],
        every: int,
        log_checkpoints: bool,
        **options: Any,
    ):
        super().__init__(save_dir=folder, prefix=prefix, resume="allow", **options)
        del self._wandb_init["anonymous"]  # of which W&B warns, though it is None
        self.every, self.log_checkpoints = every, log_checkpoints
        self.logged = max((row["_step"] for row in history(folder)), default=-1)  # the last step that W&B has
        self.latest = -1  # the step of the latest call
        self.rows: dict[int, dict[str, Any]] = {}  # that wait for what else there is of their steps
        for step, row in missed.items():
            self.log_metrics({k: float(v) for k, v in row.items() if k != "step"}, step)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        row = {f"{self._prefix}/{k}": v for k, v in metrics.items() if k != "epoch"}
        self.latest = step or 0
        if row and self.latest > self.logged:
            self.rows.setdefault(self.latest, {}).update(row)

    @rank_zero_only
    def save(self) -> None:
        """Lightning calls this after the losses of a step, which come last: callbacks have logged theirs before."""
        self.send(self.latest)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self.rows:
            self.send(max(self.rows))
        super().finalize(status)

    def send(self, last: int) -> None:
        """Send the rows of all steps up to this one, and later ones to which nothing will be added."""
        for step in sorted(step for step in self.rows if step <= last or (step + 1) % self.every):
            row = self.rows.pop(step)
            if step > self.logged:
                self.experiment.log({**row, "trainer/global_step": step}, step=step, commit=True)
                self.logged = step

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Checkpoint) -> None:
        if not self.log_checkpoints or not isinstance(checkpoint_callback, Checkpoints):
            return
        path = checkpoint_callback.path
        artifact = wandb.Artifact(f"{self.experiment.id}-checkpoint", "checkpoint")
        artifact.add_file(str(path), "checkpoint.ckpt")  # a copy: the file goes when the next checkpoint comes
        self.experiment.log_artifact(artifact, aliases=["latest", path.stem])


def records(path: Path) -> Iterator[Record]:
    """The records of a W&B file (`run-*.wandb`, in LevelDB's log format), to its end or to where a kill cut it."""
    data = path.read_bytes()
    at, part = 7, b""  # after the file's header
    while at + 7 <= len(data):
        left = -at % 32768
        if left < 7:  # a block ends with zeros where no header fits
            at += left
            if left:
                continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        chunk = data[at + 7 : at + 7 + length]
        if kind not in (1, 2, 3, 4) or len(chunk) < length:
            return
        at += 7 + length
        part = chunk if kind in (1, 2) else part + chunk
        if kind in (1, 4):  # whole, or its last chunk
            yield Record.FromString(part)


def history(folder: Path) -> Iterator[dict[str, Any]]:
    """The logged rows of all W&B files of a run folder, in order: `{"decoder/loss": 0.1, "_step": 3, ...}`."""
    for path in sorted(folder.glob("wandb/*run-*/run-*.wandb")):
        settle(path)
        for record in records(path):
            if record.HasField("history"):
                yield {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}


def settle(path: Path, still: float = 3.0, most: float = 20.0) -> None:
    """W&B writes a file from a process of its own, which may be behind: wait until it has ended the run or is still."""
    end = time.time() + most
    while time.time() < min(end, path.stat().st_mtime + still) and not any(r.HasField("exit") for r in records(path)):
        time.sleep(0.1)

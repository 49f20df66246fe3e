"""Runs of `experiments.train` in processes of their own that are killed, signalled or starved at a known point.

python resume_run.py JOBS RESULTS: JOBS is a JSON file, {name: [run, run, ...]}; the runs of a name follow one another,
two names go at a time. A run is [arguments, traps], a trap [name, number]. RESULTS gets for each name the
exit statuses (negative: the signal that ended it) and what was printed. Python and torch are loaded once:
every run is a fork.
"""

import io
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import experiments.train as train
import lightning_modules.checkpoint as checkpoint
from lightning_modules.callbacks import StepSeed
from lightning_modules.csv_logger import MetricsCSV
from lightning_modules.super_resolution import SuperResolutionModule

Run = tuple[list[str], list[tuple[str, int]]]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def always(*args: Any, **kwargs: Any) -> bool:
    return True


def after(owner: Any, name: str, count: int, act: Callable[[], Any], counts: Callable[..., bool] = always) -> None:
    """Call `act` right after the `count`th call of `owner.name` whose arguments count."""
    whole, calls = getattr(owner, name), [0]

    def replaced(*args: Any, **kwargs: Any) -> Any:
        result = whole(*args, **kwargs)
        if counts(*args, **kwargs):
            calls[0] += 1
            if calls[0] == count:
                act()
        return result

    setattr(owner, name, replaced)


def longest_file(size: int) -> None:
    """What a full disk is to a process: a write fails with an OSError."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


class Cut(io.RawIOBase):
    """A file whose writer is killed when it has taken half of a checkpoint."""

    def __init__(self, file: Any):
        self.file, self.taken = file, 0

    def write(self, data: Any) -> int:
        self.taken += self.file.write(data)
        if self.taken > 100_000:
            self.file.flush()
            die()
        return len(data)


def set_trap(name: str, number: int) -> None:
    """Arrange for what shall happen at step, write or second `number`."""
    if name == "step":  # in the middle of training step `number`
        after(StepSeed, "on_train_batch_start", number, die)
    elif name == "optimizer":  # the weights have moved, the average has not
        after(torch.optim.AdamW, "step", number, die)
    elif name == "write":  # half of a checkpoint is written
        save, calls = torch.save, [0]

        def cut(state: Any, file: Any) -> None:
            calls[0] += 1
            save(state, Cut(file) if calls[0] == number else file)

        checkpoint.torch.save = cut  # type: ignore[assignment]
    elif name == "written":  # a checkpoint has its name, last.ckpt is the one before
        after(os, "replace", number, die, lambda part, path: path.suffix == ".ckpt" and path.name != "last.ckpt")
    elif name == "linked":  # last.ckpt is new, the log has not been told
        after(os, "replace", number, die, lambda part, path: path.name == "last.ckpt")
    elif name == "row":  # half of a row of metrics.csv is written

        def torn(log: MetricsCSV, metrics: dict[str, float], step: int) -> bool:
            if step == number:
                log.path.write_bytes(log.path.read_bytes()[:-7])
            return step == number

        after(MetricsCSV, "log_metrics", 1, die, torn)
    elif name == "export":  # half of the weights are written
        after(train, "save_file", 1, die, lambda state, path, metadata: os.truncate(path, 5000) or True)
    elif name == "full":  # no file may become longer than 50 kB from the first checkpoint on, until step `number`
        after(os, "replace", 1, partial(longest_file, 50_000), lambda part, path: path.name == "last.ckpt")
        after(StepSeed, "on_train_batch_start", number, partial(longest_file, resource.RLIM_INFINITY))
    elif name == "SLURM":  # what srun sets for the one task of a job
        os.environ |= {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
        os.environ |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    elif name in ("SIGTERM", "SIGUSR1"):  # to every process of the group, as schedulers do
        after(StepSeed, "on_train_batch_start", number, lambda: os.killpg(0, signal.Signals[name]))
    elif name == "nan":  # the loss of the second training step and of the next ones, up to `number`, is nan
        loss = SuperResolutionModule.loss

        def broken(module: SuperResolutionModule, batch: dict[str, Any]) -> torch.Tensor:
            due = module.training and 1 <= module.global_step < number
            return loss(module, batch) * (float("nan") if due else 1)

        SuperResolutionModule.loss = broken  # type: ignore[method-assign]
    else:
        assert name == "seconds", name


def child(run: Run, errors: Path) -> None:
    os.setsid()
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    arguments, traps = run
    for name, number in traps:
        set_trap(name, number)
    train.main(arguments)


def start(run: Run, errors: Path) -> int:
    """Fork a run and return its process."""
    if pid := os.fork():
        return pid
    status = 70
    try:
        child(run, errors)
        status = 0
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        status = exit.code if isinstance(exit.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    jobs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]).parent
    waiting, running, statuses = list(jobs), dict[int, tuple[str, float]](), {name: list[int]() for name in jobs}

    def go_on(name: str) -> None:
        run = jobs[name][len(statuses[name])]
        limit = dict(run[1]).get("seconds", 60.0)
        running[start(run, folder / f"{name}.txt")] = (name, time.monotonic() + limit)

    while waiting or running:
        while waiting and len(running) < 2:
            go_on(waiting.pop(0))
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            name, _ = running.pop(pid)
            statuses[name].append(os.waitstatus_to_exitcode(status))
            if len(statuses[name]) < len(jobs[name]):
                go_on(name)
            continue
        for pid, (_, deadline) in running.items():
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    printed = {name: (folder / f"{name}.txt").read_text() for name in jobs}
    Path(sys.argv[2]).write_text(json.dumps({name: [statuses[name], printed[name]] for name in jobs}))


if __name__ == "__main__":
    main()

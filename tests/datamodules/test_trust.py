"""Real processes: killed and resumed on the same and on other numbers of ranks and workers; ranks never hang."""

import csv
import json
import logging
import multiprocessing
import os
import signal
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from datamodules import Curriculum, ImageTextDataModule, VideoDataModule
from lightning_modules.callbacks import DataCounts, as_key
from tests.conftest import free_port

from .keys_run import Keys, run


def start(
    folder: Path, steps: int, workers: int, world: int, batch: int, source: str, punsafe: float | None = None
) -> list[BaseProcess]:
    """Start a run, a process for each rank."""
    port = free_port()
    folder.mkdir(exist_ok=True)
    # They are forked from a process that has imported all of it once, and has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning", "datamodules", "lightning_modules.callbacks"])
    arguments = [(folder, steps, workers, batch, source, punsafe, rank, world, port) for rank in range(world)]
    processes: list[BaseProcess] = [context.Process(target=run, args=each) for each in arguments]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], folder: Path, limit: float = 120) -> None:
    """Wait for every rank; a rank that hangs fails the test."""
    for rank, process in enumerate(processes):
        process.join(limit)
        if process.exitcode is None:
            kill(processes)
            pytest.fail("a rank hangs")
        assert process.exitcode == 0, (folder / f"errors_{rank}.txt").read_text()[-2000:]


def kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()


def trained(folder: Path, pixels: bool = False) -> dict[int, list[str]]:
    """The keys of each step, over all ranks; of a step that was done twice, the last time."""
    steps: dict[int, dict[int, list[str]]] = {}
    for path in sorted(folder.glob("keys_*.txt")):
        rank = int(path.stem.split("_")[1])
        for line in path.read_text().splitlines(keepends=True):
            step, *keys = line.split()
            if line.endswith("\n"):  # killed within a line, the step is done again
                steps.setdefault(int(step), {})[rank] = keys if pixels else [key.split("/")[0] for key in keys]
    return {step: [key for rank in sorted(ranks) for key in ranks[rank]] for step, ranks in steps.items()}


def run_and_kill(folder: Path, steps: int, workers: int, world: int, batch: int, source: str) -> None:
    """Start a run and kill it with SIGKILL somewhere between its first and last step."""
    processes = start(folder, steps, workers, world, batch, source)
    deadline = time.time() + 120
    while not (folder / "last.ckpt").exists() or len(trained(folder)) < 3:
        assert time.time() < deadline and processes[0].is_alive(), (folder / "errors_0.txt").read_text()[-2000:]
        time.sleep(0.01)
    kill(processes)
    assert len(trained(folder)) < steps, "the run was over before it could be killed"


@pytest.fixture
def shards(tmp_path: Path, make_shard: Any) -> str:
    """Three uneven shards of 23, 2 and 5 samples, one of them broken."""
    (tmp_path / "shards").mkdir()
    make_shard(tmp_path / "shards" / "a.tar", 23, broken={4: {"jpg": b"no picture"}})
    make_shard(tmp_path / "shards" / "b.tar", 2, first=23)
    make_shard(tmp_path / "shards" / "c.tar", 5, first=25)
    return str(tmp_path / "shards")


@pytest.mark.parametrize("kind, workers, world", [("shards", 0, 1), ("clips", 2, 1), ("clips", 0, 2), ("shards", 2, 2)])
def test_killed_and_resumed_all_is_the_same(
    tmp_path: Path, shards: str, make_webvid: Any, kind: str, workers: int, world: int
) -> None:
    """Keys and pixels: of clips the rates of the curriculum, too. And what was skipped is counted on."""
    source = shards if kind == "shards" else str(make_webvid(tmp_path / "clips", 5, extra=("missing",)))
    steps, batch, killed, whole = 1000, 2, tmp_path / "killed", tmp_path / "whole"
    run_and_kill(killed, steps, workers, world, batch, source)
    upto = max(trained(killed)) + 10
    runs = [(start(folder, upto, workers, world, batch, source), folder) for folder in (killed, whole)]
    for processes, folder in runs:
        finish(processes, folder)
    assert trained(killed, pixels=True) == trained(whole, pixels=True)
    before, after = (json.loads((folder / "skipped_0.json").read_text()) for folder in (whole, killed))
    assert before == after or world == 2  # what another rank skipped since counts were gathered last is not saved


def test_on_other_ranks_and_workers_nothing_is_lost_or_repeated(tmp_path: Path, shards: str) -> None:
    folder = tmp_path / "run"
    finish(start(folder, 5, 2, 2, 3, shards), folder)  # 30 samples: one epoch
    first = [key for step in range(5) for key in trained(folder)[step]]
    finish(start(folder, 10, 0, 1, 3, shards), folder)
    finish(start(folder, 15, 1, 1, 3, shards), folder)
    (folder / "keys_1.txt").unlink()
    later = [key for step in range(5, 15) for key in trained(folder)[step]]
    for epoch in (first, later):
        counts = Counter(epoch)
        assert len(epoch) == 30 and len(counts) == 29 and "000000004" not in counts  # the broken one's neighbour twice
        assert sorted(counts.values())[-2:] == [1, 2]


@pytest.mark.parametrize("case", ["fewer shards than ranks", "one is filtered away"])
def test_ranks_never_hang(tmp_path: Path, make_shard: Any, case: str) -> None:
    (tmp_path / "shards").mkdir()
    punsafe = None
    good = {i: {"json": json.dumps({"caption": "c", "punsafe": 0.1}).encode()} for i in range(3)}
    make_shard(tmp_path / "shards" / "a.tar", 3, broken=good)
    if case == "one is filtered away":
        bad = {i: {"json": json.dumps({"caption": "c", "punsafe": 0.9}).encode()} for i in range(10, 40)}
        make_shard(tmp_path / "shards" / "b.tar", 30, first=10, broken=bad)
        punsafe = 0.5
    finish(start(tmp_path / "run", 6, 1, 2, 2, str(tmp_path / "shards"), punsafe), tmp_path / "run")
    seen = trained(tmp_path / "run")
    assert len(seen) == 6 and all(len(keys) == 4 for keys in seen.values())
    assert {key for keys in seen.values() for key in keys} == {f"{i:09d}" for i in range(3)}


def test_ranks_that_find_different_samples_do_not_train(tmp_path: Path, make_shard: Any) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        make_shard(tmp_path / str(rank) / "a.tar", 9)
        make_shard(tmp_path / str(rank) / "b.tar", 9, first=9)
    (tmp_path / "1" / "b.tar").write_bytes(b"")
    processes = start(tmp_path / "run", 6, 0, 2, 2, str(tmp_path / "RANK"))
    for rank, process in enumerate(processes):
        process.join(60)
        said = (tmp_path / "run" / f"errors_{rank}.txt").read_text()
        assert process.exitcode == 1 and "The ranks found different samples (18, 9 of them)" in said, said[-2000:]
    assert not trained(tmp_path / "run")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident size is read from /proc")
def test_memory_is_flat(tmp_path: Path, make_video: Any) -> None:
    """Resident size with two workers after 20,000 clips and after the first 1,000."""
    for i in range(8):
        make_video(tmp_path / "clips" / f"{i}.mp4", list(range(0, 48)), size=(64, 48))
    data = VideoDataModule(str(tmp_path / "clips"), 20, 8, 32, curriculum=Curriculum(steps=100), workers=2)
    loader = data.train_dataloader()
    batches = iter(loader)
    total, sizes = 20_000, {}
    for step in range(1, total // 20 + 1):
        data.on_before_batch_transfer(next(batches), 0)
        if step in (50, total // 20):
            pids = ["self", *(worker.pid for worker in loader.loader._iterator._workers)]
            sizes[step] = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    assert not data.skipped
    print(sizes)
    assert sizes[total // 20] < 1.05 * sizes[50], sizes


def counted(folder: Path) -> dict[int, dict[str, float]]:
    """The counts of failures that a run logged, by step."""
    rows = csv.DictReader((folder / "metrics.csv").open())
    found = [
        (int(row["step"]), {k: float(v) for k, v in row.items() if "/skipped_by_cause/" in k and v}) for row in rows
    ]
    return {step: counts for step, counts in found if counts}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_failures_are_logged_by_cause_and_counted_on_after_a_resume(
    tmp_path: Path, make_shard: Any, caplog: pytest.LogCaptureFixture, accumulate: int
) -> None:
    make_shard(tmp_path / "a.tar", 20, broken={3: {"jpg": b"no"}, 4: {"jpg": b"no"}, 5: {"json": b"[1]"}})
    (tmp_path / "b.tar").write_bytes(b"")

    def run(steps: int, version: str) -> dict[int, dict[str, float]]:
        logger = CSVLogger(tmp_path, version=version)
        saver = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
        last = tmp_path / "last.ckpt"
        options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = L.Trainer(max_steps=steps, max_epochs=-1, logger=logger, callbacks=[DataCounts(5), saver], devices=1,
                            accumulate_grad_batches=accumulate, use_distributed_sampler=False, log_every_n_steps=5,
                            **options)  # fmt: skip
        data = ImageTextDataModule(str(tmp_path), 20 // accumulate, 8)
        trainer.fit(Keys(tmp_path), datamodule=data, ckpt_path=last if last.exists() else None, weights_only=True)
        return counted(tmp_path / "lightning_logs" / version)

    image, meta, shard = (
        "the image cannot be decoded (UnidentifiedImageError)",
        "the json is not an object",
        "the shard is empty",
    )
    for steps, version in ((12, "first"), (20, "second")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            logged = run(steps, version)
        expected = {step: {image: 2.0 * step, meta: 1.0 * step, shard: 1.0} for step in (5, 10, 12, 15, 20)}
        rows = (5, 10) if version == "first" else (15, 20)  # Lightning calls the first step 0
        assert logged == {
            n - 1: {f"data/skipped_by_cause/{as_key(k)}": v for k, v in expected[n].items()} for n in rows
        }
        assert f"{sum(expected[steps].values()):.0f} samples could not be read so far. " in caplog.text
        assert f"{expected[steps][image]:.0f} times: {image} (as in {tmp_path}/a.tar:00000000" in caplog.text


def test_the_histogram_of_rates_has_every_clip_once(tmp_path: Path, make_webvid: Any) -> None:
    shown: list[tuple[int, int]] = []

    class Board(WandbLogger):
        def __init__(self) -> None:
            pass

        @property
        def experiment(self) -> Any:
            return SimpleNamespace()

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            shown.extend((step or 0, sum(value.histogram)) for key, value in metrics.items() if key == "data/rates")

        save_dir = name = version = None
        log_hyperparams = log_graph = save = finalize = lambda self, *values, **named: None

    options: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=9, max_epochs=-1, logger=Board(), callbacks=[DataCounts(3)], devices=1,
                        enable_checkpointing=False, accumulate_grad_batches=4, **options)  # fmt: skip
    data = VideoDataModule(make_webvid(tmp_path, 2), 2, 2, 8, curriculum=Curriculum(steps=3))
    trainer.fit(Keys(tmp_path), datamodule=data)
    assert shown == [(3, 24), (6, 24), (9, 24)]

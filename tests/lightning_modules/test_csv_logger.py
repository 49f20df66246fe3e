"""metrics.csv: one row for a step, also when a run takes steps again after a kill."""

import csv
from pathlib import Path

from lightning_modules.csv_logger import MetricsCSV


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_steps_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = MetricsCSV(path)
    for step in range(5):
        first.log_metrics({"loss": step / 4, "epoch": 0}, step)
    resumed = MetricsCSV(path, first_step=3)  # killed at step 5, the last checkpoint has three steps behind it
    resumed.log_metrics({"loss": 9.0}, 3)
    assert [(row["step"], float(row["loss"])) for row in rows(path)] == [("0", 0), ("1", 0.25), ("2", 0.5), ("3", 9)]


def test_a_late_metric_gets_a_column_and_shares_the_row_of_its_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    log = MetricsCSV(path)
    log.log_metrics({"loss": 1.0}, 0)
    log.log_metrics({"probe": 2.0}, 0)
    log.log_metrics({"loss": 3.0}, 1)
    assert rows(path) == [{"step": "0", "loss": "1.0", "probe": "2.0"}, {"step": "1", "loss": "3.0", "probe": ""}]


def test_a_row_cut_by_a_kill_is_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n0,1.0\n1,bro")  # the last row was cut by a kill
    log = MetricsCSV(path, first_step=1)
    log.log_metrics({"loss": 2.0}, 1)
    assert [row["loss"] for row in rows(path)] == ["1.0", "2.0"]

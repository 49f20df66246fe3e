"""metrics.csv of a run: one file, one curve, also across interruptions."""

import csv
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lightning_modules.whole import whole


class MetricsCSV(Logger):
    """A row for each logged step, in a file that a resumed run goes on with (Lightning's CSVLogger starts anew).

    Args:
        path: the file.
        first_step: rows from this step on are of steps after the checkpoint that the run resumes from; the run
            takes these steps again, so the rows are dropped.
        timings: hold the metrics `time/...` and no others, instead of all but these: no two runs take the same time,
            while all else is the same after a resume.
    """

    def __init__(self, path: Path, first_step: int = 0, timings: bool = False):
        super().__init__()
        self.path, self.timings = path, timings
        self.rows: dict[int, dict[str, str]] = {}
        self.columns = ["step"]
        self.whole = False  # does the file hold all rows?
        if path.is_file():
            with path.open(newline="") as file:
                old = {int(row["step"]): row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()}
            self.rows = {step: {k: v for k, v in row.items() if v} for step, row in old.items() if step < first_step}
            self.rewrite()

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The resolved config lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        own = {k: v for k, v in metrics.items() if k.startswith("time/") == self.timings and k != "epoch"}
        row = {k: repr(float(v)) for k, v in own.items() if isinstance(v, (int, float))}  # no pictures
        if not row:
            return
        step = step or 0
        if row.items() <= self.rows.get(step, {}).items():  # written already, before a checkpoint
            return
        fresh = self.whole and step > next(reversed(self.rows), -1) and set(row) <= set(self.columns)
        self.rows.setdefault(step, {"step": str(step)}).update(row)
        try:
            if fresh:
                self.whole = False
                with self.path.open("a", newline="") as file:
                    csv.DictWriter(file, self.columns).writerow(self.rows[step])
                self.whole = True
            else:
                self.rewrite()
        except OSError as error:  # a full disk must not stop training; the rows wait for the next that can be written
            warnings.warn(f"{self.path} could not be written ({error.strerror}).", stacklevel=2)

    @rank_zero_only
    def rewrite(self) -> None:
        """Write all rows, in the order of steps: after a resume, or when a new metric needs a column."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = dict(sorted(self.rows.items()))
        self.columns = list(dict.fromkeys(["step", *(key for row in self.rows.values() for key in row)]))
        self.whole = False
        with whole(self.path) as part, part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows.values())
        self.whole = True

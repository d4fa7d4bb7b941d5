"""Log a training, one row per epoch: to log.csv, to TensorBoard if it is installed, and to stdout."""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hover_batch.files import write_atomically

LOG = "log.csv"
"""Name of the table in the output folder."""
EVENTS = "tensorboard"
"""Folder of the TensorBoard files in the output folder: `tensorboard --logdir OUT/tensorboard`."""
PRINT_EVERY_S = 30.0
"""Shortest interval between progress lines, in seconds."""


class Log:
    """Log of the training in the folder `out`; an existing one is continued.

    A note is printed if TensorBoard is not installed.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / LOG
        self.events = out / EVENTS
        self._printed_at = time.monotonic()
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError:
            self.has_events = False
            print(f"tensorboard is not installed: writing only {self.path}", flush=True)
        else:
            self.has_events = True

    def step(self, done: int, steps: int, s_per_step: float) -> None:
        """Print the progress to stdout, at most once every PRINT_EVERY_S seconds.

        `done`: number of steps so far. `steps`: number of the last step of this run. `s_per_step`: mean seconds per
        step.
        """
        if (now := time.monotonic()) - self._printed_at >= PRINT_EVERY_S:
            self._printed_at = now
            left = s_per_step * (steps - done)
            print(f"  step {done} of {steps}, {s_per_step:.2g} s each, {left / 60:.0f} min left", flush=True)

    def write(self, row: Mapping[str, float]) -> None:
        """Append the row of an epoch to log.csv and TensorBoard, and print it to stdout.

        Rows of the same and later steps are removed; an interrupted run may have left them. A log.csv that is not a log
        is renamed, and a note is printed, so that the training goes on.

        `row`: values by column; it must contain `step`. Raises OSError if a file cannot be written.
        """
        rows = [r for r in self._rows() if float(r["step"]) < row["step"]]
        rows.append({name: f"{value:.6g}" for name, value in row.items()})
        # An epoch may add columns: the first one may have had no image with types.
        write_rows(self.path, rows)
        if self.has_events:
            self._to_tensorboard(row)
        print(" ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)

    def _rows(self) -> list[dict[str, str]]:
        try:
            rows = read_log(self.path)
            if all(math.isfinite(float(row["step"])) for row in rows):
                return rows
        except (ValueError, KeyError, TypeError, csv.Error):
            pass
        kept = self.path.with_name(f"damaged_{LOG}")
        os.replace(self.path, kept)
        print(f"note: {self.path} is not a log of kd train; renamed to {kept.name}, and a new one is begun", flush=True)
        return []

    def _to_tensorboard(self, row: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        step = int(row["step"])
        # One file per epoch, closed at once, so that none stays half written. Purged rows are from an interrupted run.
        with SummaryWriter(str(self.events), purge_step=step) as writer:
            for name, value in row.items():
                if name != "step":
                    group = "validation" if name.startswith("val_") else "training"
                    writer.add_scalar(f"{group}/{name}", value, step)


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows, values by column, to a CSV file in one step; an existing file is replaced.

    Its columns are those of all rows, in the order in which they appear. Raises OSError if it cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def read_log(path: Path) -> list[dict[str, str]]:
    """Return the rows of the log.csv at `path`, as texts by column, without empty cells.

    Empty if there is no such file. Raises OSError if it cannot be read.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as f:
        return [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(f)]

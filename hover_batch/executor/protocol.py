"""Interface of the executors, and the context that they are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from hover_batch.cohort.ledger import Ledger
from hover_batch.config import InferSettings, Settings
from hover_batch.executor.disk_space import DiskSpace
from hover_batch.executor.progress import CohortProgress
from hover_batch.executor.run_recorder import RunRecorder
from hover_batch.model.package import Package
from hover_batch.plan import PlannedSlide
from hover_batch.slide.staging import Copies

if TYPE_CHECKING:  # it imports torch, which readers and post-processing do without
    from hover_batch.model.predict import Predictor

LoadNetwork = Callable[[Package, InferSettings], "Predictor"]
"""Function that loads a network: `hover_batch.model.predict.load_predictor`, except in tests."""


class Executor(Protocol):
    """Interface of an object that runs the slides of a cohort."""

    def run(self, slides: Sequence[PlannedSlide]) -> None:
        """Run every slide until it is done or has failed. A failed slide is recorded, and does not stop the others.

        Call it from the main thread, which receives signals.

        Errors that are not caused by a slide stop the cohort: PackageError if the model cannot be loaded,
        HoverBatchError if the process of a network dies repeatedly, InputError if a node of the cluster cannot be used,
        and OSError if the run's records cannot be written. TooManyFailures if more slides failed than the settings
        allow. KeyboardInterrupt after one of `interrupts.SIGNALS`, such as Ctrl-C.
        """
        ...


@dataclass(frozen=True)
class RunContext:
    """Settings, model and records of one run, as executors need them."""

    package: Package
    """Package of the model."""
    settings: Settings
    """Settings in effect, with `auto` resolved."""
    recorder: RunRecorder
    """Recorder of what happens to the slides."""
    disk: DiskSpace
    """Monitor of the disk space in the output folder."""
    copies: Copies
    """Copies on each machine of slides in cloud storage."""

    @classmethod
    def of(
        cls, package: Package, settings: Settings, ledger: Ledger, progress: CohortProgress, run_keys: Mapping[str, str]
    ) -> Self:
        """Return the context of a run in the folder of `ledger`, which must be started.

        `package`: package of the model. `settings`: settings in effect, with `auto` resolved. `progress`: progress
        display, which also shows warnings. `run_keys`: run key of each slide by slide_id (see `result_key`).

        RuntimeError if the ledger is not started.
        """
        root = ledger.layout.root
        recorder = RunRecorder(settings, ledger, progress, run_keys)
        disk = DiskSpace(root, progress.warn, ledger.events.append)
        return cls(package, settings, recorder, disk, Copies.of_run(root, settings.engine.scratch))

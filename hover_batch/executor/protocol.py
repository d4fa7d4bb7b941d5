"""What every executor offers, and what it is given."""

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
"""Loads a network; `hover_batch.model.predict.load_predictor`, except in tests."""


class Executor(Protocol):
    """Executor that runs the slides of a cohort."""

    def run(self, slides: Sequence[PlannedSlide]) -> None:
        """Run every slide until it is done or failed. A failed slide does not stop the others.

        Errors that are not caused by a slide stop the cohort: PackageError if the model cannot be loaded,
        HoverBatchError if its process dies repeatedly, TooManyFailures, InputError if a node cannot follow a setting,
        and KeyboardInterrupt after Ctrl-C.
        """
        ...


@dataclass(frozen=True)
class RunContext:
    """Settings, model and records of one run, as executors need them."""

    package: Package
    settings: Settings
    recorder: RunRecorder
    disk: DiskSpace
    copies: Copies
    """Local copies of slides that lie in other storage."""

    @classmethod
    def of(
        cls, package: Package, settings: Settings, ledger: Ledger, progress: CohortProgress, run_keys: Mapping[str, str]
    ) -> Self:
        """Build the context of a run. `run_keys`: keys of the results by slide_id."""
        root = ledger.layout.root
        recorder = RunRecorder(settings, ledger, progress, run_keys)
        disk = DiskSpace(root, progress.warn, ledger.events.append)
        return cls(package, settings, recorder, disk, Copies.of_run(root, settings.engine.scratch))

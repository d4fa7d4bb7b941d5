"""The fault policy: which verdict each exception gets. `OpenSlides.apply` says what a verdict does.

It imports Ray, so import it inside `cluster.started` or `cluster.joined`, which set Ray's environment.
"""

from __future__ import annotations

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    UnserializableException,
)

from hover_batch.errors import HoverBatchError
from hover_batch.executor.disk_space import is_disk_full
from hover_batch.executor.slide_state import Verdict
from hover_batch.pipeline import NetworkFailed, UnitsMissing


class NetworkStopped(Exception):
    """The driver stopped the network that worked on the task."""


VERDICTS: tuple[tuple[type[Exception], Verdict], ...] = (
    # Raised by a task, or by the driver about one.
    (UnitsMissing, Verdict.RETRY),
    (NetworkStopped, Verdict.RETRY),
    (NetworkFailed, Verdict.STRIKE),  # its device may be broken: another network takes over
    (MemoryError, Verdict.SHORT_OF_MEMORY),
    # Raised by Ray in place of a task that could not end.
    (NodeDiedError, Verdict.NODE_LOST),
    (ObjectLostError, Verdict.NODE_LOST),
    (OutOfMemoryError, Verdict.SHORT_OF_MEMORY),
    (OutOfDiskError, Verdict.DISK_FULL),
    (RayError, Verdict.STRIKE),
    # What raises once raises again.
    (Exception, Verdict.FAIL),
)
"""The first entry that the exception is an instance of decides; a full disk (errno) comes before all of them."""


class WorkerDied(HoverBatchError):
    """Error that stands in for Ray's exception when the process or the node of a task died before the task ended.

    `verdict`: the verdict on Ray's exception. Unlike Ray's, it can be raised by a task and reach the driver unchanged.
    """

    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(verdict, reason)  # both, for pickle
        self.verdict = verdict

    def __str__(self) -> str:
        return str(self.args[1])


def verdict_on(error: BaseException) -> Verdict:
    """Return the verdict on an exception that a task or the driver raised, or that Ray raised in place of a task."""
    if isinstance(error, WorkerDied):
        return error.verdict
    if is_disk_full(error):
        return Verdict.DISK_FULL
    return next(verdict for kind, verdict in VERDICTS if isinstance(error, kind))


def cause_of(error: RayError, process: str = "its process") -> Exception:
    """Return the exception that a task raised, or WorkerDied if its process ended before the task.

    `process`: words for that process in the message. An exception that could not be pickled becomes a RuntimeError with
    its text.
    """
    if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
        cause: Exception = error.cause
        return cause
    if isinstance(error, RayTaskError | UnserializableException):  # what was raised could not be pickled
        return RuntimeError(str(error).splitlines()[-1])
    return WorkerDied(verdict_on(error), f"{process} died ({type(error).__name__})")

"""Fault policy: the verdict on each exception. What a verdict does, and how often, is in `slide_state`.

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
    """Error of a task whose network was stopped by the driver; the task is not to blame."""


VERDICTS: tuple[tuple[type[Exception], Verdict], ...] = (
    # Raised by a task, or by the driver about one.
    (UnitsMissing, Verdict.RETRY),
    (NetworkStopped, Verdict.RETRY),
    # Its device may be broken: another network takes over. If memory ran out, it tried smaller batches first.
    (NetworkFailed, Verdict.STRIKE),
    (MemoryError, Verdict.SHORT_OF_MEMORY),
    # Raised by Ray in place of a task that could not end.
    (NodeDiedError, Verdict.NODE_LOST),
    (ObjectLostError, Verdict.NODE_LOST),
    (OutOfMemoryError, Verdict.SHORT_OF_MEMORY),
    (OutOfDiskError, Verdict.DISK_FULL),
    (RayError, Verdict.STRIKE),
    # Other exceptions would be raised again by a retry.
    (Exception, Verdict.FAIL),
)
"""(exception class, verdict); the first class that matches counts. A full disk (errno) takes precedence over all."""


class WorkerDied(HoverBatchError):
    """Error in place of Ray's exception when the process or the node of a task died before the task ended.

    `verdict`: verdict on Ray's exception. `reason`: message. Unlike Ray's exceptions, it reaches the driver unchanged
    when a task raises it.
    """

    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(verdict, reason)  # both, for pickle
        self.verdict = verdict

    def __str__(self) -> str:
        return str(self.args[1])


def verdict_on(error: BaseException) -> Verdict:
    """Return the verdict on `error`.

    A WorkerDied carries its verdict. A full disk gives DISK_FULL. For other errors, the first matching class in
    VERDICTS decides.

    `error`: exception that a task or the driver raised, or that Ray raised in place of a task.
    """
    if isinstance(error, WorkerDied):
        return error.verdict
    if is_disk_full(error):
        return Verdict.DISK_FULL
    return next(verdict for kind, verdict in VERDICTS if isinstance(error, kind))


def cause_of(error: RayError, process: str = "its process") -> Exception:
    """Return the exception behind Ray's `error`: what the task raised, or WorkerDied if its process died.

    If the task raised a RayError, or an exception that cannot be pickled, return a RuntimeError with the last line of
    the text of `error`.

    `process`: name of the process, for the message of WorkerDied.
    """
    if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
        cause: Exception = error.cause
        return cause
    if isinstance(error, RayTaskError | UnserializableException):  # what was raised could not be pickled
        return RuntimeError(str(error).splitlines()[-1])
    return WorkerDied(verdict_on(error), f"{process} died ({type(error).__name__})")

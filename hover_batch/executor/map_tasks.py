"""Map a function over many items on either backend, for work other than slides, as in `kd`.

On Ray each item is a task in a process of its own. A task whose process dies is retried, by the same limits as those of
a slide's tasks; a lack of memory or disk counts like a crash.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hover_batch.config import BackendChoice, EngineSettings, Settings
from hover_batch.executor.resources import Node, Resources

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TaskFailed:
    """Result of a task that failed."""

    error: Exception
    """Exception that the function raised, or WorkerDied if its process died too often (FAILS_AT)."""


@contextlib.contextmanager
def task_resources(engine: EngineSettings, log: Path) -> Iterator[Resources]:
    """Yield the CPU cores and GPUs for `map_tasks`, and start or join a Ray cluster for it unless the backend is local.

    Unless the backend is local, stdout is redirected to `log` while the block runs, and Ray's environment variables are
    set and stay set. While Ray starts, stderr is redirected, too, unless it is a terminal. The cluster is stopped or
    left when the block ends.

    `engine`: settings that choose the backend (auto counts as ray), name a cluster and limit the resources. `log`: file
    to which Ray's output is appended.

    InputError if the settings request more than is available, Ray does not start, no cluster answers, or it refuses the
    token or has no node with a CPU core. OSError if the temporary folder of a new cluster cannot be created.
    """
    settings = Settings(engine=engine)
    if engine.backend == "local":
        yield Resources((Node.here(),)).limited(settings)
    elif engine.address:
        from hover_batch.executor.cluster import joined

        with joined(engine.address, log):
            from hover_batch.executor.nodes import ClusterNodes

            yield ClusterNodes().resources.limited(settings)
    else:
        from hover_batch.executor.cluster import started

        resources = Resources((Node.here(),)).limited(settings)
        with started(resources, log):
            yield resources


def map_tasks(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    backend: BackendChoice,
    cpus: float = 1,
    gpus: float = 0,
    at_once: int = 1,
    reuse_workers: bool = False,
) -> Iterator[tuple[Item, Result | TaskFailed]]:
    """Yield each item with the function's result, or with TaskFailed if the task failed.

    A failed task does not stop the others. With `backend` "local", the items are processed in this process, in order.
    Otherwise they are processed on the cluster that `task_resources` started or joined, and yielded in the order in
    which they end. Function, items and results must then be picklable. A task whose process dies is started again,
    unless it has already been started FAILS_AT[STRIKE] (2) times or, if its node was lost, FAILS_AT[NODE_LOST] (5)
    times. Then it fails.

    `function`: function of one item; its exceptions are yielded as TaskFailed. `items`: items to process. They are
    taken only as tasks start, so they may be endless; exceptions of their iterator propagate.

    The other parameters have no effect with `backend` "local". `cpus`, `gpus`: cores and GPUs that each task reserves;
    with fractions, several tasks share one GPU. `at_once`: maximum number of tasks in progress. `reuse_workers`: if
    True, a process with a GPU runs several tasks and keeps what it has loaded; if False, it ends after each task to
    free the memory.
    """
    if backend == "local":
        yield from _here(function, items)
    else:
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
        if reuse_workers:
            options["max_calls"] = 0  # no limit; Ray's default for tasks with a GPU is 1
        yield from _on_ray(function, items, options, at_once)


def _here(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result | TaskFailed]]:
    for item in items:
        result: Result | TaskFailed
        try:
            result = function(item)
        except Exception as error:
            result = TaskFailed(error)
        yield item, result


def _on_ray(
    function: Callable[[Item], Result], items: Iterable[Item], options: dict[str, Any], at_once: int
) -> Iterator[tuple[Item, Result | TaskFailed]]:
    import ray
    from ray.exceptions import RayError

    from hover_batch.executor.faults import WorkerDied, cause_of
    from hover_batch.executor.slide_state import FAILS_AT, Verdict

    task: Any = ray.remote(max_retries=0, **options)(function)
    running: dict[Any, tuple[Item, int]] = {}
    waiting = iter(items)
    exhausted = False
    while running or not exhausted:
        while not exhausted and len(running) < at_once:
            try:
                item = next(waiting)
            except StopIteration:
                exhausted = True
            else:
                running[task.remote(item)] = (item, 1)
        if not running:
            return
        ready, _ = ray.wait(list(running), num_returns=1)
        for reference in ready:
            item, attempt = running.pop(reference)
            result: Result | TaskFailed
            try:
                result = ray.get(reference)
            except RayError as error:
                cause = cause_of(error)
                if isinstance(cause, WorkerDied) and attempt < FAILS_AT.get(cause.verdict, FAILS_AT[Verdict.STRIKE]):
                    running[task.remote(item)] = (item, attempt + 1)
                    continue
                result = TaskFailed(cause)
            yield item, result

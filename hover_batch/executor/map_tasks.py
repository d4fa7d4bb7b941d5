"""One function over many items, on either backend: for work that is no slide, as `kd` has it.

On Ray each item is a task of its own, in a process that may die alone; an item whose process dies is tried once more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hover_batch.config import Backend, EngineSettings, Settings
from hover_batch.executor.resources import MAX_STRIKES, Node, Resources

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class TaskFailed:
    """In place of a result: what the function raised, or that its process died MAX_STRIKES times."""

    error: Exception


@contextlib.contextmanager
def machines(engine: EngineSettings, log: Path) -> Iterator[Resources]:
    """What `map_tasks` may use while the block runs: with Ray a cluster, started on this machine or joined.

    `log`: the file for what Ray has to say. InputError where the settings ask for more than there is, or no cluster
    answers.
    """
    settings = Settings(engine=engine)
    if engine.backend == "local":
        yield Resources((Node.here(),)).limited(settings)
    elif engine.address:
        from hover_batch.executor.cluster import joined

        with joined(engine.address, log):
            from hover_batch.executor.nodes import Machines

            yield Machines().resources.limited(settings)
    else:
        from hover_batch.executor.cluster import started

        resources = Resources((Node.here(),)).limited(settings)
        with started(resources, log):
            yield resources


def map_tasks(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    backend: Backend,
    cpus: float = 1,
    gpus: float = 0,
    at_once: int = 1,
    stay: bool = False,
) -> Iterator[tuple[Item, Result | TaskFailed]]:
    """Yield each item with the function's result for it, or with TaskFailed: one that fails costs itself only.

    `local`: here, in order. `ray`: on the cluster that `hover_batch.executor.cluster` has started or joined, in the
    order in which they end; each task reserves `cpus` and `gpus` (fractions share one GPU), and `at_once` of them are
    under way, so that an endless iterable is taken as fast as it is worked off. A process with a GPU ends with its
    task, and frees its memory; told to `stay`, it goes on to the next one with what it has loaded.
    """
    if backend == "local":
        yield from _here(function, items)
    else:
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus}
        yield from _on_ray(function, items, options | ({"max_calls": 0} if stay else {}), at_once)


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
    from ray.exceptions import RayError, RayTaskError

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
                running[task.remote(item)] = (item, 0)
        if not running:
            return
        ready, _ = ray.wait(list(running), num_returns=1)
        for reference in ready:
            item, strikes = running.pop(reference)
            result: Result | TaskFailed
            try:
                result = ray.get(reference)
            except RayTaskError as error:
                result = TaskFailed(error.cause)
            except RayError as error:
                if strikes + 1 < MAX_STRIKES:
                    running[task.remote(item)] = (item, strikes + 1)
                    continue
                result = TaskFailed(error)
            yield item, result

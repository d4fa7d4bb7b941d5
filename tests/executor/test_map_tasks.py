"""One function over many items gives the same results on both backends; a crash costs at most one item."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Literal

from hover_batch.executor.map_tasks import TaskFailed, map_tasks


def halve(number: int) -> int:
    if number % 2:
        raise ValueError(f"{number} is odd")
    return number // 2


def test_results_and_failures_come_with_their_items(backend: Literal["ray", "local"]) -> None:
    found = dict(map_tasks(lambda n: n // 2 if n % 2 == 0 else halve(n), range(6), backend=backend, at_once=3))
    assert {n: r for n, r in found.items() if n % 2 == 0} == {0: 0, 2: 1, 4: 2}
    for n in (1, 3, 5):
        failed = found[n]
        assert isinstance(failed, TaskFailed)
        assert isinstance(failed.error, ValueError) and str(failed.error) == f"{n} is odd"


def test_items_are_taken_as_they_are_worked_off(backend: Literal["ray", "local"]) -> None:
    taken = []

    def endless() -> itertools.chain[int]:
        for n in itertools.count():
            taken.append(n)
            yield n

    results = map_tasks(lambda n: n, endless(), backend=backend, at_once=2)
    assert len([next(results) for _ in range(5)]) == 5
    assert len(taken) <= 7
    results.close()


def test_a_death_costs_an_attempt_and_two_the_item(ray_cluster: Path, tmp_path: Path) -> None:
    def work(name: str) -> str:
        for number in range({"sound": 0, "once": 1, "always": 2}[name]):
            try:
                os.close(os.open(tmp_path / f"{name}-{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        return name

    found = dict(map_tasks(work, ["sound", "once", "always"], backend="ray", at_once=2))
    assert found["sound"] == "sound" and found["once"] == "once"
    assert isinstance(found["always"], TaskFailed)

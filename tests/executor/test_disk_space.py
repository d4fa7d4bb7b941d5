"""Room on disk: asked every few seconds, less often where it runs out again and again."""

from __future__ import annotations

from pathlib import Path

import pytest

from hover_batch.executor import disk_space
from hover_batch.executor.disk_space import ASK_EVERY_S, MAX_WAIT_S, Room


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ticking = Clock()
    monkeypatch.setattr(disk_space, "time", ticking)
    return ticking


def test_it_is_full_until_it_was_asked_and_there_is_room(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    logged: list[str] = []
    asked: list[int] = []
    there = False
    monkeypatch.setattr(disk_space, "_fits", lambda folder, n: asked.append(n) or there)
    disk = Room(tmp_path, said.append, lambda event, **values: logged.append(event))
    assert disk.there() and not asked
    disk.ran_out("slide")
    disk.ran_out("another")
    assert disk.full and not disk.there() and not asked, "it is not asked at once"
    assert len(said) == 1 and "slide" in said[0]
    clock.now += ASK_EVERY_S
    assert not disk.there() and not disk.there() and len(asked) == 1
    there = True
    assert disk.full, "nobody asked"
    clock.now += ASK_EVERY_S
    assert disk.there() and not disk.full
    assert logged == ["disk_full", "disk_has_room"]


def test_waits_grow_where_it_runs_out_again(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space, "_fits", lambda folder, n: True)
    disk = Room(tmp_path, lambda line: None, lambda event, **values: None)
    waits = []
    for _ in range(10):
        begun = clock.now
        disk.ran_out("slide")
        while not disk.there():
            clock.now += 1
        waits.append(clock.now - begun)
    assert waits[0] == ASK_EVERY_S and waits == sorted(waits) and waits[-1] == MAX_WAIT_S
    clock.now += 10 * MAX_WAIT_S
    disk.ran_out("slide")
    clock.now += ASK_EVERY_S
    assert disk.there()


def test_room_is_asked_of_the_file_system(tmp_path: Path) -> None:
    assert disk_space._fits(tmp_path, 1 << 20)
    assert not any(tmp_path.iterdir())

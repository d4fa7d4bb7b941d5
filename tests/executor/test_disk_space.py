"""The disk is checked every few seconds, less often if it repeatedly fills up."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from hover_batch.errors import ScratchFull
from hover_batch.executor import disk_space
from hover_batch.executor.disk_space import CHECK_EVERY_S, MAX_WAIT_S, DiskSpace


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    ticking = Clock()
    monkeypatch.setattr(disk_space, "time", ticking)
    return ticking


def test_it_is_full_until_a_check_finds_space(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    events: list[str] = []
    checks: list[int] = []
    free = False
    monkeypatch.setattr(disk_space, "_can_reserve", lambda folder, n: checks.append(n) or free)
    disk = DiskSpace(tmp_path, warnings.append, lambda event, **values: events.append(event))
    assert disk.available() and not checks
    disk.report_full("slide")
    disk.report_full("another")
    assert disk.full and not disk.available() and not checks, "it is not checked at once"
    assert len(warnings) == 1 and "slide" in warnings[0]
    clock.now += CHECK_EVERY_S
    assert not disk.available() and not disk.available() and len(checks) == 1
    free = True
    assert disk.full, "nothing was checked"
    clock.now += CHECK_EVERY_S
    assert disk.available() and not disk.full
    assert events == ["disk_full", "disk_has_room"]


def test_the_disk_of_the_copies_is_watched_if_it_is_the_full_one(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch, gone, checked = tmp_path / "scratch", tmp_path / "gone", []
    scratch.mkdir()
    monkeypatch.setattr(disk_space, "_can_reserve", lambda folder, n: checked.append(folder) or True)
    disk = DiskSpace(tmp_path, lambda line: None, lambda event, **values: None)
    for folder in (scratch, gone, None):
        error = ScratchFull(errno.ENOSPC, "full", str(folder)) if folder else OSError(errno.ENOSPC, "full")
        disk.report_full("slide", error)
        clock.now += MAX_WAIT_S
        assert disk.available()
    assert checked == [scratch, tmp_path, tmp_path]


def test_waits_grow_if_it_fills_up_again(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_space, "_can_reserve", lambda folder, n: True)
    disk = DiskSpace(tmp_path, lambda line: None, lambda event, **values: None)
    waits = []
    for _ in range(10):
        begun = clock.now
        disk.report_full("slide")
        while not disk.available():
            clock.now += 1
        waits.append(clock.now - begun)
    assert waits[0] == CHECK_EVERY_S and waits == sorted(waits) and waits[-1] == MAX_WAIT_S
    clock.now += 10 * MAX_WAIT_S
    disk.report_full("slide")
    clock.now += CHECK_EVERY_S
    assert disk.available()


def test_the_file_system_is_asked(tmp_path: Path) -> None:
    assert disk_space._can_reserve(tmp_path, 1 << 20)
    assert not any(tmp_path.iterdir())

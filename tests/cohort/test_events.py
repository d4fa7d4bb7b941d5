"""Event log: appended lines survive kills, and incomplete lines are removed or skipped."""

from __future__ import annotations

import threading
from datetime import datetime
from pathlib import Path

import pytest

from hover_batch.cohort.events import EventLog, stream_events


def test_events_come_back_in_order_with_their_time(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "events.jsonl"
    log = EventLog(path)
    log.append("slide_started", slide_id="a")
    log.append("slide_failed", slide_id="a", reason="two\nlines, µ")
    # Readable while the log is open: nothing waits in a buffer.
    first, second = list(stream_events(path))
    log.close()
    assert (first["event"], first["slide_id"]) == ("slide_started", "a")
    assert second["reason"] == "two\nlines, µ"
    assert datetime.fromisoformat(first["time"]) <= datetime.fromisoformat(second["time"])
    assert datetime.fromisoformat(first["time"]).utcoffset() is not None


def test_no_file_no_events(tmp_path: Path) -> None:
    assert list(stream_events(tmp_path / "none")) == []


@pytest.mark.parametrize(
    "torn", [b"{", b'{"time": "2026', b'{"event": "whole but unfinished"}', b"\xc2", b"x" * 200_000]
)
def test_a_torn_last_line_is_passed_over_and_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.append("one")
    log.close()
    with open(path, "ab") as file:
        file.write(torn)
    assert [event["event"] for event in stream_events(path)] == ["one"]
    log = EventLog(path)
    log.append("two")
    log.close()
    assert [event["event"] for event in stream_events(path)] == ["one", "two"]


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")

    def write(number: int) -> None:
        for _ in range(50):
            log.append("x", text=str(number) * 3000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    events = list(stream_events(tmp_path / "events.jsonl"))
    assert len(events) == 200
    assert all(len(set(event["text"])) == 1 for event in events)

"""Where a run stands, from its files alone: no lock is kept, nothing is written, and the run may go on meanwhile.

What cannot be known is left out, never guessed: a log of an older run may lack some events, files may vanish while
they are read, and another machine's lock may not be seen from here.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import socket
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hover_batch.cohort.events import stream_events
from hover_batch.cohort.layout import RunLayout, SlideLayout
from hover_batch.cohort.ledger import RUN_FORMAT, is_locked
from hover_batch.errors import InputError

LISTED = 10
"""Failures and slides under way that are named; a cohort may have thousands."""
RATE_WINDOW_S = 600.0
"""How far back the rate looks."""
TROUBLES = {"strike": "a process died or failed", "lost": "a machine was lost", "memory_short": "memory ran out"}
"""Events after which a piece of work is done again, in words."""


@dataclass(frozen=True)
class Failed:
    """A slide, or a row that never became one, that failed since the last start."""

    slide_id: str
    row: int | None
    stage: str
    reason: str


@dataclass(frozen=True)
class Open:
    """A slide that was begun and is not done. `units` and `tiles` are its totals, None where the log lacks them."""

    slide_id: str
    predicted: int
    posted: int
    units: int | None
    tiles: int | None

    @property
    def regions_left(self) -> float | None:
        return None if self.units is None else max(0, self.units - self.posted)

    @property
    def tiles_left(self) -> float | None:
        if self.units is None or self.tiles is None:
            return None
        return self.tiles * (1 - min(1.0, self.predicted / self.units)) if self.units else 0.0

    def line(self) -> str:
        of = "" if self.units is None else f" of {self.units:,}"
        return f"{self.slide_id}: {self.predicted:,}{of} units predicted, {self.posted:,}{of} regions post-processed"


@dataclass(frozen=True)
class Rate:
    """Tiles predicted, or regions post-processed where nothing is, a second: over the `seconds` of wall time that end
    with the last of them, at `until`."""

    per_s: float
    seconds: float
    until: datetime


class Window:
    """Amounts and when they were done, of the last minutes."""

    def __init__(self, begin: datetime) -> None:
        self._held = deque([(begin, 0)])
        """The first one only says when the window begins."""

    def add(self, time: datetime, amount: int) -> None:
        self._held.append((time, amount))
        while len(self._held) > 2 and (time - self._held[1][0]).total_seconds() >= RATE_WINDOW_S:
            self._held.popleft()

    @property
    def rate(self) -> Rate | None:
        """None where nothing was done."""
        (begin, _), (end, _) = self._held[0], self._held[-1]
        seconds, amount = (end - begin).total_seconds(), sum(n for _, n in list(self._held)[1:])
        return Rate(amount / seconds, seconds, end) if seconds > 0 and amount > 0 else None


@dataclass
class Log:
    """What events.jsonl tells: of the last start, but for `surveyed` and `model_busy`, the last word of any start."""

    started: datetime | None = None
    last: datetime | None = None
    finished: datetime | None = None
    failures: list[tuple[Failed, datetime]] = field(default_factory=list)
    slides_done: int = 0
    last_slide: datetime | None = None
    stopped: bool = False
    """Whether the last start ended before its cohort did: by Ctrl-C, or for want of disk."""
    surveyed: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Units and tiles by slide_id."""
    model_busy: float | None = None
    disk_full: datetime | None = None
    """Since when the run waits for room on its disk."""
    troubles: Counter[str] = field(default_factory=Counter)
    """By kind of event: what was done again, and why."""
    machines: tuple[int, int] | None = None
    """And networks on them, where machines of the cluster came or went."""
    _tiles: Window | None = None
    _regions: Window | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        """Add the next event. One without a time, or of a kind not known here, is passed over."""
        if (time := _utc(event.get("time"))) is None:
            return
        self.last = time
        match event:
            case {"event": "run_started" | "run_resumed"}:
                self.started, self.finished, self.last_slide = time, None, None
                self.failures, self.slides_done = [], 0
                self.disk_full, self.troubles, self.machines = None, Counter(), None
                self._tiles, self._regions = Window(time), Window(time)
            case {"event": "run_finished" | "run_stopped" as ended}:
                self.finished, self.stopped, self.disk_full = time, ended == "run_stopped", None
                busy = event.get("model_busy")
                self.model_busy = float(busy) if isinstance(busy, int | float) else None
            case {"event": "slide_surveyed", "slide_id": str(slide_id), "units": int(units), "tiles": int(tiles)}:
                self.surveyed[slide_id] = units, tiles
            case {"event": "unit_done", "tiles": int(tiles)} if self._tiles:
                self._tiles.add(time, tiles)
            case {"event": "region_done"} if self._regions:
                self._regions.add(time, 1)
            case {"event": "disk_full"}:
                self.disk_full = time
            case {"event": "disk_has_room"}:
                self.disk_full = None
            case {"event": str(kind)} if kind in TROUBLES:
                self.troubles[kind] += 1
            case {"event": "machines_changed", "machines": int(machines), "networks": int(networks)}:
                self.machines = machines, networks
            case {"event": "slide_done"}:
                self.slides_done += 1
                self.last_slide = time
            case {"event": "slide_failed", "slide_id": str(slide_id)}:
                row = event.get("row")
                words = (str(event.get(name, "")) for name in ("stage", "reason"))
                self.failures.append((Failed(slide_id, row if isinstance(row, int) else None, *words), time))

    @property
    def tile_rate(self) -> Rate | None:
        """None where no unit was predicted since the start, or the log does not say how many tiles it had."""
        return self._tiles.rate if self._tiles else None

    @property
    def region_rate(self) -> Rate | None:
        return self._regions.rate if self._regions else None


@dataclass(frozen=True)
class Status:
    """Where a run stands. `going_on` is None where it is not known, and `unknown` says why."""

    layout: RunLayout
    model: str
    created: datetime | None
    going_on: bool | None
    unknown: str
    holder: str
    log: Log
    slides: int | None
    """In the cohort; None where slides.csv is not there yet."""
    done: int
    nuclei: int
    open: tuple[Open, ...]
    failures: tuple[Failed, ...]
    failed: int
    """Slides of the cohort; those of `failures` that are not among them are rows left out."""
    left_out: int

    @property
    def pending(self) -> int:
        return (self.slides or 0) - self.done - self.failed - len(self.open)

    def seconds_left(self) -> tuple[float, str] | None:
        """An estimate and what it rests on; None where there is no base for one, or nothing goes on."""
        log = self.log
        if self.going_on is False or log.finished or log.disk_full:
            return None
        left = self.pending + len(self.open)
        if self.pending and log.slides_done and log.started and log.last_slide:
            mean = (log.last_slide - log.started).total_seconds() / log.slides_done
            return mean * left, (
                f"if the {_count(left, 'slide')} left go as fast as the {log.slides_done:,} finished since the start"
            )
        tiles, regions = [slide.tiles_left for slide in self.open], [slide.regions_left for slide in self.open]
        if rate := log.tile_rate:
            return _time_for(tiles, rate, "to predict the rest of the slides under way")
        if rate := log.region_rate:
            return _time_for(regions, rate, "to post-process the rest of the slides under way")
        return None

    def lines(self) -> list[str]:
        """In words, for stdout."""
        made = f", begun {_clock(self.created)}" if self.created else ""
        lines = [f"{self.layout.root}: model {self.model}{made}", f"running: {self._running()}"]
        if (full := self.log.disk_full) and self.going_on is not False:
            lines.append(f"paused: the disk is full since {_clock(full)}; free some and the run goes on by itself")
        if self.log.machines:
            machines, networks = self.log.machines
            lines.append(
                f"cluster: {_count(machines, 'machine')}, {_count(networks, 'network')}, since some came or went"
            )
        if troubles := [
            f"{words}: {self.log.troubles[kind]:,}" for kind, words in TROUBLES.items() if self.log.troubles[kind]
        ]:
            lines.append(f"tried again since the start: {', '.join(troubles)}")
        if self.slides is None:
            lines.append("slides: not known, slides.csv is not there")
        else:
            word = "begun" if self.going_on is False else "under way"
            left_out = f"; {_count(self.left_out, 'row')} of the cohort left out" if self.left_out else ""
            lines.append(
                f"slides: {self.done:,} done, {self.failed:,} failed, {len(self.open):,} {word}, "
                f"{self.pending:,} pending, of {self.slides:,}{left_out}"
            )
        lines += [f"  {slide.line()}" for slide in self.open[:LISTED]]
        if len(self.open) > LISTED:
            lines.append(f"  … and {len(self.open) - LISTED:,} more")
        lines.append(f"nuclei: {self.nuclei:,} in {_count(self.done, 'slide')}")
        for rate, what in ((self.log.tile_rate, "tiles"), (self.log.region_rate, "regions")):
            if rate:
                until = f"in the {_span(rate.seconds)} up to {_clock(rate.until)}"
                lines.append(f"rate: about {rate.per_s:.3g} {what}/s {until}")
                break
        if estimate := self.seconds_left():
            lines.append(f"time left: about {_span(estimate[0])} {estimate[1]}")
        if self.log.model_busy is not None:
            which = "" if self.log.finished else ", in an earlier start"
            lines.append(f"model busy: {self.log.model_busy:.0%} of the time{which}")
        if self.failures:
            lines.append("failures since the last start:")
            for failure in self.failures[:LISTED]:
                stage = f" ({failure.stage})" if failure.stage else ""
                lines.append(f"  {failure.slide_id}{stage}: {' '.join(failure.reason.split())}")
            if len(self.failures) > LISTED:
                lines.append(f"  … and {len(self.failures) - LISTED:,} more in {self._failures_file}")
        return lines

    @property
    def _failures_file(self) -> Path:
        """failures.csv is of the present start only once that has ended."""
        return self.layout.failures_csv if self.log.finished else self.layout.events_jsonl

    def _running(self) -> str:
        log = self.log
        times = f"; started {_clock(log.started)}" if log.started else ""
        if log.last:
            ago = max(0.0, (datetime.now(UTC) - log.last).total_seconds())
            times += f", last event {_clock(log.last)} ({_span(ago)} ago)"
        if self.going_on:
            return f"yes, {self.holder or 'by whom is not known'}{times}"
        if self.going_on is None:
            how = "was stopped before its end" if log.stopped else "ended"
            ended = f"; the last start {how}" if log.finished else ""
            return f"not known, {self.unknown}{ended}{times}"
        if log.finished and not log.stopped:
            return f"no, it ended{times}"
        return f"no, it stopped before its end and the same command goes on from there{times}"

    def to_json(self) -> str:
        """The same for machines: nothing is cut, and what is not known is null."""
        log, estimate = self.log, self.seconds_left()
        tiles, regions = log.tile_rate, log.region_rate
        last = tiles or regions
        value = {
            "folder": str(self.layout.root),
            "model": self.model,
            "created": _iso(self.created),
            "going_on": self.going_on,
            "holder": self.holder or None,
            "started": _iso(log.started),
            "last_event": _iso(log.last),
            "finished": _iso(log.finished),
            "disk_full_since": _iso(log.disk_full),
            "tried_again": {kind: log.troubles[kind] for kind in TROUBLES},
            "machines": log.machines[0] if log.machines else None,
            "slides": None
            if self.slides is None
            else {
                "total": self.slides,
                "done": self.done,
                "failed": self.failed,
                "under_way": len(self.open),
                "pending": self.pending,
                "left_out": self.left_out,
            },
            "under_way": [
                {
                    "slide_id": slide.slide_id,
                    "units_predicted": slide.predicted,
                    "regions_posted": slide.posted,
                    "units": slide.units,
                    "tiles": slide.tiles,
                }
                for slide in self.open
            ],
            "nuclei": self.nuclei,
            "tiles_per_s": tiles.per_s if tiles else None,
            "regions_per_s": regions.per_s if regions else None,
            "rate_until": _iso(last.until if last else None),
            "seconds_left": estimate[0] if estimate else None,
            "seconds_left_base": estimate[1] if estimate else None,
            "model_busy": log.model_busy,
            "failures": [asdict(failure) for failure in self.failures],
        }
        return json.dumps(value, indent=2)


def read_status(folder: Path) -> Status:
    """Read the run in `folder`. InputError where that is no run's folder, or cannot be read."""
    layout = RunLayout(folder)
    try:
        run = read_run(layout, folder)
        # The lock before the log: a run that ends in between is then one that ended, not one that was killed.
        locked, holder = is_locked(layout.lock), (_read(layout.lock) or b"").decode(errors="replace").strip()
        log = Log()
        for event in stream_events(layout.events_jsonl):
            log.take(event)
        return _status(layout, run, locked, holder, log)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{error.filename or folder}: cannot be read ({reason}); mend that and ask again") from error


def _status(layout: RunLayout, run: Mapping[str, Any], locked: bool | None, holder: str, log: Log) -> Status:
    unknown = "" if locked is not None else "this file system does not tell locks"
    host = holder.rpartition(" on ")[2]
    if locked is False and log.started and not log.finished and host not in ("", socket.gethostname()):
        locked, unknown = None, f"a lock that {host} holds may not be seen from here"

    cohort = read_slides(layout)
    failed_at: dict[int | None, datetime] = {failure.row: time for failure, time in log.failures}
    done, nuclei, mended, failed = 0, 0, set(), set()
    under_way: list[Open] = []
    for row, slide in (cohort or {}).items():
        held = nuclei_if_done(slide, failed_at.get(row))
        if held is not None:
            done += 1
            nuclei += held
            mended.add(row)
        elif row in failed_at:
            failed.add(row)
        elif slide.key_json.exists():
            units, tiles = log.surveyed.get(slide.slide_id, (None, None))
            predicted, posted = _count_files(slide.markers), _count_files(slide.parts)
            under_way.append(Open(slide.slide_id, predicted, posted, units, tiles))
    return Status(
        layout=layout,
        model=str(run.get("model_id", "not known")),
        created=_utc(run.get("created")),
        going_on=locked,
        unknown=unknown,
        holder=holder if locked else "",
        log=log,
        slides=None if cohort is None else len(cohort),
        done=done,
        nuclei=nuclei,
        open=tuple(under_way),
        failures=tuple(failure for failure, _ in log.failures if failure.row not in mended),
        failed=len(failed),
        left_out=0 if cohort is None else len(failed_at.keys() - cohort.keys()),
    )


def read_run(layout: RunLayout, folder: Path) -> dict[str, Any]:
    """What run.json says. InputError where `folder`, as the user named it, is no run's."""
    try:
        run = json.loads(_read(layout.run_json) or b"")
    except ValueError:
        run = None
    if not isinstance(run, dict) or run.get("format") != RUN_FORMAT:
        raise InputError(
            f"{folder}: no run's folder, it has no run.json of hover-batch; give the --output of `segment`"
        )
    return run


def read_slides(layout: RunLayout) -> dict[int, SlideLayout] | None:
    """The slides by their row in the cohort; None where no run has listed them yet."""
    content = _read(layout.slides_csv)
    if content is None:
        return None
    slides = {}
    for cells in csv.DictReader(io.StringIO(content.decode(errors="replace"), newline="")):
        try:
            slides[int(cells["row"])] = layout.slide(cells["slide_id"])
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{layout.slides_csv}: was changed by hand; segment writes it anew on resuming") from error
    return slides


def nuclei_if_done(slide: SlideLayout, failed_at: datetime | None = None) -> int | None:
    """The nuclei of a slide that is done, else None. A slide.json older than the slide's failure in the last start is
    of an earlier one: the run did not find it good."""
    try:
        modified = slide.slide_json.stat().st_mtime
        held = json.loads(_read(slide.slide_json) or b"")
        nuclei = held["nuclei"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(nuclei, int) or (failed_at is not None and modified < failed_at.timestamp()):
        return None
    return nuclei


def _count_files(folder: Path) -> int:
    """Files in `folder`; hidden ones are writes that are not complete."""
    return sum(not name.startswith(".") for name in _names(folder))


def _names(folder: Path) -> Iterator[str]:
    try:
        yield from os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return


def _read(path: Path) -> bytes | None:
    """None where there is no such file. A file that is replaced over NFS while it is read is read once more."""
    for _ in range(2):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return None


def _time_for(left: Sequence[float | None], rate: Rate, what: str) -> tuple[float, str] | None:
    """None where it is not known how much is left, or nothing is."""
    known = [n for n in left if n is not None]
    return (total / rate.per_s, what) if len(known) == len(left) and (total := sum(known)) > 0 else None


def _utc(time: object) -> datetime | None:
    try:
        return datetime.fromisoformat(str(time)).astimezone(UTC)
    except ValueError:
        return None


def _clock(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _iso(time: datetime | None) -> str | None:
    return None if time is None else time.isoformat(timespec="milliseconds")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _span(seconds: float) -> str:
    """Rounded as an estimate deserves."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"

"""Report the progress of a run from its files. Nothing is written and no lock is held, so the run is not disturbed.

Unknown values are omitted, not guessed: the log of an older run may lack some events, files may disappear while they
are read, and another machine's lock may not be visible here.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.run_folder import estimate_line, estimate_of, read_slides, require_run, slide_if_done
from hover_batch.cohort.run_lock import is_locked
from hover_batch.cohort.run_log import RETRY_CAUSES, LoggedFailure, Rate, RunLog, to_utc
from hover_batch.errors import InputError, file_fault
from hover_batch.files import read_file
from hover_batch.formatting import LISTED, counted, duration
from hover_batch.quality.flags import Flag, counts_of, flag_slides


@dataclass(frozen=True)
class UnfinishedSlide:
    """Slide that is in progress."""

    slide_id: str
    """Id of the slide in the cohort."""
    predicted: int
    """Number of units that are predicted."""
    posted: int
    """Number of regions that are post-processed."""
    units: int | None
    """Total number of units, which is also that of regions; None if the log lacks it."""
    tiles: int | None
    """Total number of tiles; None if the log lacks it."""

    @property
    def regions_left(self) -> float | None:
        """Number of regions still to be post-processed; None if the total is unknown."""
        return None if self.units is None else max(0, self.units - self.posted)

    @property
    def tiles_left(self) -> float | None:
        """Estimated number of tiles still to be predicted; None if the total is unknown.

        It is the total number of tiles times the fraction of units that are not predicted yet.
        """
        if self.units is None or self.tiles is None:
            return None
        if not self.units:
            return 0.0
        return self.tiles * (1 - min(1.0, self.predicted / self.units))

    def line(self) -> str:
        """Return the progress of the slide as one line of text, with the numbers of units and regions that are done."""
        of = "" if self.units is None else f" of {self.units:,}"
        return f"{self.slide_id}: {self.predicted:,}{of} units predicted, {self.posted:,}{of} regions post-processed"


@dataclass(frozen=True)
class RunStatus:
    """Progress of a run."""

    layout: RunLayout
    """Paths of the run's results."""
    model: str
    """Name of the model."""
    created: datetime | None
    """Time of the first start; None if unknown."""
    is_running: bool | None
    """Whether a process is running it now; None if unknown."""
    unknown: str
    """Reason why `is_running` is None; else empty."""
    holder: str
    """Process that is running it, as `process PID on HOST`; empty if there is none."""
    log: RunLog
    """Summary of the log."""
    slides: int | None
    """Number of slides in the cohort; None if slides.csv is not written yet."""
    done: int
    """Number of finished slides."""
    nuclei: int
    """Number of nuclei in the finished slides."""
    open: tuple[UnfinishedSlide, ...]
    """Slides in progress."""
    estimates: Mapping[str, Mapping[str, Any]]
    """Estimates of slides whose density is estimated from a part of them, by slide_id: section of estimate.json."""
    failures: tuple[LoggedFailure, ...]
    """Failures since the last start."""
    failed: int
    """Number of failed slides."""
    left_out: int
    """Number of invalid rows of the cohort, which were skipped."""
    flags: Mapping[str, tuple[Flag, ...]]
    """Flags of finished slides by slide_id; only slides that have some."""

    @property
    def pending(self) -> int:
        """Number of slides that are not started: neither done, estimated, failed nor in progress."""
        return (self.slides or 0) - self.done - len(self.estimates) - self.failed - len(self.open)

    def seconds_left(self) -> tuple[float, str] | None:
        """Return the estimated seconds left, and the basis of the estimate in words; None if there is no estimate.

        If slides are pending and at least one was finished since the start, the basis is the mean time of the finished
        ones. Otherwise it is the rate of tiles or, without one, the rate of regions, and the estimate covers only the
        slides in progress. There is no estimate if the run has ended, is known not to be running or waits for disk
        space, or if the log does not suffice.
        """
        log = self.log
        if self.is_running is False or log.finished or log.disk_full:
            return None
        left = self.pending + len(self.open)
        if self.pending and log.slides_done and log.started and log.last_slide:
            seconds_per_slide = (log.last_slide - log.started).total_seconds() / log.slides_done
            return seconds_per_slide * left, (
                f"if the {counted(left, 'slide')} left go as fast as the {log.slides_done:,} finished since the start"
            )
        if rate := log.tile_rate:
            tiles = [slide.tiles_left for slide in self.open]
            return _time_for(tiles, rate, "to predict the rest of the slides in progress")
        if rate := log.region_rate:
            regions = [slide.regions_left for slide in self.open]
            return _time_for(regions, rate, "to post-process the rest of the slides in progress")
        return None

    def lines(self) -> list[str]:
        """Return the progress of the run as lines of text, as `hover-batch status` prints them.

        Of the slides in progress, the estimates and the failures, the first LISTED (10) each are listed.
        """
        begun = f", begun {_clock(self.created)}" if self.created else ""
        lines = [f"{self.layout.root}: model {self.model}{begun}", f"running: {self._running()}"]
        if self.log.disk_full and self.is_running is not False:
            full_since = _clock(self.log.disk_full)
            lines.append(
                f"paused: the disk has been full since {full_since}; free some space, and the run continues by itself"
            )
        if self.log.nodes_and_networks:
            nodes, networks = self.log.nodes_and_networks
            lines.append(
                f"cluster: now {counted(nodes, 'node')} and {counted(networks, 'network')}, after nodes joined or left"
            )
        if retries := [f"{cause}: {n:,}" for kind, cause in RETRY_CAUSES.items() if (n := self.log.retries[kind])]:
            lines.append(f"retries since the start: {', '.join(retries)}")
        if self.slides is None:
            lines.append("slides: not known, since slides.csv is not written yet")
        else:
            open_word = "begun" if self.is_running is False else "in progress"
            left_out = f"; {counted(self.left_out, 'row')} of the cohort left out" if self.left_out else ""
            estimated = f"{len(self.estimates):,} estimated, " if self.estimates else ""
            lines.append(
                f"slides: {self.done:,} done, {estimated}{self.failed:,} failed, {len(self.open):,} {open_word}, "
                f"{self.pending:,} pending, of {self.slides:,}{left_out}"
            )
        lines += [f"  {slide.line()}" for slide in self.open[:LISTED]]
        if len(self.open) > LISTED:
            lines.append(f"  … and {len(self.open) - LISTED:,} more")
        lines += [f"  {name}: {estimate_line(estimate)}" for name, estimate in [*self.estimates.items()][:LISTED]]
        if len(self.estimates) > LISTED:
            lines.append(f"  … and {len(self.estimates) - LISTED:,} more estimated")
        if self.slides is not None:
            lines.append(f"nuclei: {self.nuclei:,} in {counted(self.done, 'slide')}")
        if self.log.upload_url:
            lines.append(f"uploaded: {counted(self.log.uploaded, 'slide')} to {self.log.upload_url}")
        if self.flags:
            kinds = ", ".join(f"{name} {count:,}" for name, count in counts_of(self.flags).items())
            lines.append(f"flagged: {counted(len(self.flags), 'slide')} ({kinds}); `hover-batch report` shows them")
        for rate, unit in ((self.log.tile_rate, "tiles"), (self.log.region_rate, "regions")):
            if rate:
                window = f"in the {duration(rate.seconds)} up to {_clock(rate.until)}"
                lines.append(f"rate: about {rate.per_s:.3g} {unit}/s {window}")
                break
        if estimate := self.seconds_left():
            seconds, basis = estimate
            lines.append(f"time left: about {duration(seconds)} {basis}")
        if self.log.model_busy is not None:
            when = "" if self.log.finished else ", in an earlier start"
            lines.append(f"networks busy: {self.log.model_busy:.0%} of the time{when}")
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
        """File that lists the failures of the last start; failures.csv is written only when it has ended."""
        return self.layout.failures_csv if self.log.finished else self.layout.events_jsonl

    def _running(self) -> str:
        """Return in words whether the run goes on, in which process, and since when."""
        log = self.log
        times = f"; started {_clock(log.started)}" if log.started else ""
        if log.last:
            ago = max(0.0, (datetime.now(UTC) - log.last).total_seconds())
            times += f", last event {_clock(log.last)} ({duration(ago)} ago)"
        if self.is_running:
            return f"yes, {self.holder or 'by an unknown process'}{times}"
        if self.is_running is None:
            how = "was stopped before its end" if log.stopped else "ended"
            ended = f"; the last start {how}" if log.finished else ""
            return f"not known, {self.unknown}{ended}{times}"
        if log.finished and not log.stopped:
            return f"no, it ended{times}"
        return f"no, it stopped before its end; repeat the segment command to resume it{times}"

    def to_json(self) -> str:
        """Return the status as indented JSON text, as `hover-batch status --json` prints it.

        Unknown values are null; times are ISO 8601 in UTC. The keys are folder, model, created, going_on (true, false
        or null), holder, started, last_event, finished, disk_full_since, nodes (number of nodes after the last change),
        nuclei, tiles_per_s, regions_per_s, rate_until, seconds_left, seconds_left_base (its basis in words), model_busy
        (0 to 1), and these objects and lists:

        - tried_again: number of retries by cause (strike, lost, memory_short)
        - slides: total, done, failed, under_way, pending and left_out
        - under_way: list of slides in progress, with slide_id, units_predicted, regions_posted, units and tiles
        - estimated: section `estimate` of estimate.json, by slide_id
        - uploaded: url and slides (number of uploaded slides)
        - flagged: for each slide_id, the sentence of each flag, by name
        - failures: list of failures, with slide_id, row, stage and reason
        """
        log, estimate = self.log, self.seconds_left()
        tile_rate, region_rate = log.tile_rate, log.region_rate
        shown_rate = tile_rate or region_rate
        value = {
            "folder": str(self.layout.root),
            "model": self.model,
            "created": _iso(self.created),
            "going_on": self.is_running,
            "holder": self.holder or None,
            "started": _iso(log.started),
            "last_event": _iso(log.last),
            "finished": _iso(log.finished),
            "disk_full_since": _iso(log.disk_full),
            "tried_again": {kind: log.retries[kind] for kind in RETRY_CAUSES},
            "nodes": log.nodes_and_networks[0] if log.nodes_and_networks else None,
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
            "estimated": dict(self.estimates),
            "uploaded": {"url": log.upload_url, "slides": log.uploaded} if log.upload_url else None,
            "flagged": {
                slide_id: {flag.name: flag.sentence for flag in flags} for slide_id, flags in self.flags.items()
            },
            "tiles_per_s": tile_rate.per_s if tile_rate else None,
            "regions_per_s": region_rate.per_s if region_rate else None,
            "rate_until": _iso(shown_rate.until if shown_rate else None),
            "seconds_left": estimate[0] if estimate else None,
            "seconds_left_base": estimate[1] if estimate else None,
            "model_busy": log.model_busy,
            "failures": [asdict(failure) for failure in self.failures],
        }
        return json.dumps(value, indent=2)


def read_status(folder: Path) -> RunStatus:
    """Return the progress of the run in `folder`.

    InputError if the folder holds no run, or a file of the run is corrupted or cannot be read.
    """
    layout = RunLayout(folder)
    try:
        run = require_run(layout)
        # Read the lock before the log: otherwise a run that ends in between would look as if it had been killed.
        locked = is_locked(layout.lock)
        holder = (read_file(layout.lock) or b"").decode(errors="replace").strip()
        return _status(layout, run, locked, holder, RunLog.read(layout.events_jsonl))
    except OSError as error:
        raise InputError(file_fault(error)) from error


def _status(layout: RunLayout, run: Mapping[str, Any], locked: bool | None, holder: str, log: RunLog) -> RunStatus:
    """Return the progress. `locked`: whether a process, `holder`, holds the lock of the run; None if unknown."""
    unknown = "" if locked is not None else "this file system does not show locks"
    host = holder.rpartition(" on ")[2]
    if locked is False and log.started and not log.finished and host not in ("", socket.gethostname()):
        locked, unknown = None, f"a lock held by {host} may not be visible from here"

    slides = read_slides(layout)
    failed_at: dict[int | None, datetime] = {failure.row: time for failure, time in log.failures}
    done: dict[str, dict[str, Any]] = {}
    estimates: dict[str, Mapping[str, Any]] = {}
    recovered, failed = set(), set()
    unfinished: list[UnfinishedSlide] = []
    for record in slides or ():
        slide, row = layout.slide(record.slide_id), record.row
        stored = slide_if_done(slide, failed_at.get(row))
        if stored is not None:
            done[slide.slide_id] = stored
            recovered.add(row)
        elif row in failed_at:
            failed.add(row)
        elif (estimated := estimate_of(slide)) is not None:
            estimates[slide.slide_id] = estimated["estimate"]
        elif slide.key_json.exists():
            units, tiles = log.surveyed.get(slide.slide_id, (None, None))
            # Until the whole slide is processed, its clusters are the units.
            at_work = slide.sample if not (_count_files(slide.markers) or _count_files(slide.parts)) else slide
            predicted, posted = _count_files(at_work.markers), _count_files(at_work.parts)
            unfinished.append(UnfinishedSlide(slide.slide_id, predicted, posted, units, tiles))
    return RunStatus(
        layout=layout,
        model=str(run.get("model_id", "not known")),
        created=to_utc(run.get("created")),
        is_running=locked,
        unknown=unknown,
        holder=holder if locked else "",
        log=log,
        slides=None if slides is None else len(slides),
        done=len(done),
        nuclei=sum(stored["nuclei"] for stored in done.values()),
        open=tuple(unfinished),
        estimates=estimates,
        failures=tuple(failure for failure, _ in log.failures if failure.row not in recovered),
        failed=len(failed),
        left_out=0 if slides is None else len(failed_at.keys() - {record.row for record in slides}),
        flags={slide_id: flags for slide_id, flags in flag_slides(done).items() if flags},
    )


def _count_files(folder: Path) -> int:
    """Count the files in `folder`, except hidden ones, which are still being written."""
    try:
        return sum(not name.startswith(".") for name in os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _time_for(left: Sequence[float | None], rate: Rate, what: str) -> tuple[float, str] | None:
    """Return the seconds for all that is left, and `what`; None if nothing is left or an amount is unknown."""
    known = [n for n in left if n is not None]
    return (total / rate.per_s, what) if len(known) == len(left) and (total := sum(known)) > 0 else None


def _clock(time: datetime) -> str:
    """Format a time for people."""
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def _iso(time: datetime | None) -> str | None:
    """Format a time for other programs, as ISO 8601."""
    return None if time is None else time.isoformat(timespec="milliseconds")

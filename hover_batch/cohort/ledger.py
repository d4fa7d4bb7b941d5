"""Write a run's folder: its identity, which slides are done, and which failed.

The folder belongs to one run (weights, settings that change results, schema version) and is written by one process
at a time. A slide's work belongs to one run key; work of another key is removed, never mixed in.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import tomli_w

from hover_batch.cohort.csv_rows import COLUMNS, MPP_COLUMNS, RUN_COLUMNS
from hover_batch.cohort.events import EventLog
from hover_batch.cohort.layout import RunLayout, SlideLayout
from hover_batch.cohort.manifest import Cohort
from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.cohort.run_folder import (
    RUN_FORMAT,
    estimate_of,
    nuclei_if_done,
    read_run,
    slide_if_done,
    unlisted_slides,
)
from hover_batch.cohort.run_key import ModelId, refuse_changes, refuse_other_slides, run_identity
from hover_batch.cohort.run_lock import locked
from hover_batch.config import Settings
from hover_batch.errors import InputError
from hover_batch.files import read_json, remove, remove_leftovers, to_json, write_atomically, write_first
from hover_batch.formatting import encoding_fault


@dataclass(frozen=True)
class SlideFailure:
    """Row of failures.csv."""

    slide_id: str
    """Id of the slide; for a row that is not a valid slide, its name in messages."""
    row: int
    """Line of the CSV (the header is line 1), or position in the listing of a folder or glob."""
    path: str
    """Path or URL of the slide, without credentials; may be empty."""
    stage: str
    """`Stage` in which it failed."""
    reason: str
    """Message for the user."""


class Ledger:
    """Record of one run in the folder of `layout`. Use it in a `with` block, which locks the folder until it ends.

    Entering it creates the folder: InputError if it cannot be written, another run is writing to it, its run.json is
    invalid, or it holds files but no run. Call `start` before other methods that write; these raise OSError.
    """

    def __init__(self, layout: RunLayout) -> None:
        self.layout = layout
        self._lock = contextlib.ExitStack()
        self._events: EventLog | None = None
        self._failures: list[SlideFailure] = []
        self._done: set[str] = set()

    def __enter__(self) -> Self:
        root = self.layout.root
        if fault := encoding_fault(str(root)):
            raise InputError(f"--output {root}: {fault}")
        try:
            # Before anything is written: a folder that holds anything else does not even get a lock file.
            if root.is_dir():
                self._read_run()
            root.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(self.layout.lock))
            probe = root / f".probe-{uuid.uuid4().hex}"
            write_first(probe, b"can be written and linked\n")
            probe.unlink()
        except OSError as error:
            self._close()
            # Only os.link reports two file names.
            reason = "its file system has no hard links" if error.filename2 is not None else error.strerror
            raise InputError(f"--output {root}: cannot be written ({reason}); name another folder") from error
        except InputError:
            self._close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None
        self._lock.close()

    @property
    def events(self) -> EventLog:
        """Log of the run's changes of state. RuntimeError before `start` and after the `with` block."""
        if self._events is None:
            raise RuntimeError("the log of events is open only after `start`, in the ledger's `with` block")
        return self._events

    def start(
        self,
        *,
        settings: Settings,
        model: ModelId,
        schema_version: int,
        cohort: Cohort,
        versions: Mapping[str, str],
        command: Sequence[str],
        force: bool = False,
        run_keys: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Begin the run, or resume the one in the folder: write its files, open the event log and log the start.

        The files are run.json (for a new run), settings.toml, versions.json and slides.csv.

        `settings`: settings in effect, with "auto" resolved. `model`: model of the run. `schema_version`: version of
        the table's columns. `cohort`: slides of the run. `versions`: versions by package. `command`: words of the
        command line. `force`: whether to remove the results in the folder first. `run_keys`: run keys by slide_id.

        InputError if run.json is corrupted, OSError if a file cannot be written. Without `force`, SettingsChanged if
        the run in the folder has another model, results key or schema version, or a finished slide has another run key.
        """
        identity = run_identity(model, settings.results_key(), schema_version)
        stored = self._read_run()
        if force:
            self.clear()
        elif stored is not None:
            refuse_changes(self.layout.root, stored, identity)
            finished = {name: read_json(self.layout.slide(name).slide_json) or {} for name in run_keys}
            keys = {slide_id: slide.get("run_key") for slide_id, slide in finished.items()}
            refuse_other_slides(self.layout.root, keys, run_keys)
        is_new = stored is None or force
        if is_new:
            run = {
                **identity,
                "format": RUN_FORMAT,
                "results_key_sha256": hashlib.sha256(to_json(identity["results_key"])).hexdigest(),
                "cohort": cohort.source,
                "command": list(command),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            # The first file: a folder with other files and no run.json does not count as a run.
            write_atomically(self.layout.run_json, to_json(run))
        write_atomically(self.layout.settings_toml, tomli_w.dumps(settings.to_dict()))
        write_atomically(self.layout.versions_json, to_json(dict(versions)))
        self.write_slides(cohort.records)
        self._events = EventLog(self.layout.events_jsonl)
        self.events.append(
            "run_started" if is_new else "run_resumed",
            command=list(command),
            slides=len(cohort.records),
            versions=dict(versions),
        )

    def orphans(self, cohort: Cohort) -> list[str]:
        """Return the sorted slide_ids of the slides with a slide.json in the output folder that are not in `cohort`."""
        return unlisted_slides(self.layout, {record.slide_id for record in cohort.records})

    def _slides(self) -> Iterator[SlideLayout]:
        """Yield the slides that have a folder here, by name; folders whose name is not a slide_id are skipped."""
        for folder in sorted(self.layout.slides.iterdir()) if self.layout.slides.is_dir() else []:
            with contextlib.suppress(InputError):
                yield self.layout.slide(folder.name)

    def _read_run(self) -> dict[str, Any] | None:
        """Return run.json; None in an empty folder. InputError where the folder holds anything else."""
        layout = self.layout
        run = read_run(layout, "--output")
        if run is None:
            # Hidden files do not count: they are our lock, leftovers of killed writes, or made by desktops. The slides
            # of --example are written before the run begins, and a joined cluster may have logged already.
            known = [path for path in (layout.example, layout.logs) if path.is_dir()]
            entries = (entry for entry in layout.root.iterdir() if not entry.name.startswith("."))
            if unknown := sorted(entry.name for entry in entries if entry not in known):
                raise InputError(
                    f"--output {layout.root}: holds {unknown[0]} but no run.json, so it is not the folder of a "
                    "run; name a new folder"
                )
        return run

    def clear(self) -> None:
        """Remove the results of the run and of all its slides. The lock, the example and unknown files stay.

        run.json stays until `start` replaces it, in case of an interruption. OSError if a file cannot be removed.
        """
        layout = self.layout
        for slide in self._slides():
            self._clear_slide(slide)
        _remove_empty(layout.slides)
        for path in (
            layout.summary_csv, layout.summary_parquet, layout.report_html, layout.report_slides, layout.slides_csv,
            layout.failures_csv, layout.settings_toml, layout.versions_json, layout.events_jsonl, layout.ray_log,
        ):  # fmt: skip
            _remove(path)
        _remove_empty(layout.logs)

    @staticmethod
    def _clear_slide(slide: SlideLayout) -> None:
        """Remove all of a slide's results, in the order of its layout."""
        for path in slide.removal_order:
            _remove(path)
        _remove_empty(slide.folder)

    def open_slide(self, slide_id: str, key: str) -> SlideLayout:
        """Make the folders of a slide for results with the run key `key`, and return the slide's paths.

        Unfinished work with this key stays; work with another key is removed. slide.json and estimate.json are always
        removed, so that new ones can be written. Call it only if `is_done` and, with --stop-at, `is_estimated` are
        False for the slide. OSError if a file cannot be written or removed.
        """
        slide = self.layout.slide(slide_id)
        key_content = to_json({"run_key": key})
        if not (slide.key_json.is_file() and slide.key_json.read_bytes() == key_content):
            if slide.folder.is_dir():
                self._clear_slide(slide)
            slide.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(slide.key_json, key_content)
        _remove(slide.slide_json)
        _remove(slide.estimate_json)
        slide.markers.mkdir(exist_ok=True)
        slide.parts.mkdir(exist_ok=True)
        return slide

    def is_done(self, slide_id: str, key: str) -> bool:
        """Return whether the slide is finished: slide.json has the run key `key`, and the table has the recorded size.

        If so, the slide counts as done from now on, in slides.csv and in the log's last event. If no size is recorded,
        the table only has to exist. Its checksum is not compared, to save time. OSError if a file cannot be read.
        """
        slide = self.layout.slide(slide_id)
        stored = slide_if_done(slide)
        if stored is None or stored.get("run_key") != key or not slide.nuclei_parquet.is_file():
            return False
        size = slide.nuclei_parquet.stat().st_size
        if stored.get("nuclei_bytes", size) != size:
            return False
        self._done.add(slide_id)
        return True

    def is_estimated(self, slide_id: str, key: str, of: str, stop_at: float) -> bool:
        """Return whether the slide's density is estimated precisely enough, and the table of its clusters exists.

        estimate.json must be for the run key `key` and the density `of` (`nuclei` or a class), with --stop-at at most
        `stop_at`; no slide.json may exist. If True, the slide counts as done in the log's last event. OSError if a file
        cannot be read.
        """
        slide = self.layout.slide(slide_id)
        stored = estimate_of(slide)
        if stored is None or stored.get("run_key") != key or not slide.sampled_nuclei_parquet.is_file():
            return False
        if stored["estimate"]["of"] != of or stored["estimate"]["stop_at"] > stop_at:
            return False
        self._done.add(slide_id)
        return True

    def write_estimate_json(self, slide_id: str, key: str, values: Mapping[str, Any]) -> None:
        """Write estimate.json with `values` (JSON), the slide_id and the run key `key`, and log the event.

        The slide counts as done from now on; an existing file is replaced. OSError if a file cannot be written.
        """
        write_atomically(
            self.layout.slide(slide_id).estimate_json, to_json({**values, "slide_id": slide_id, "run_key": key})
        )
        self._done.add(slide_id)
        self.events.append("slide_estimated", slide_id=slide_id)

    def write_slide_json(self, slide_id: str, key: str, values: Mapping[str, Any]) -> bool:
        """Declare the slide done: write slide.json with `values` (JSON), the slide_id and the run key, and log it.

        Return True if it was written, and False if it exists, because another writer finished first. Then that file
        stays and nothing is logged, but the slide still counts as done. OSError if a file cannot be written.
        """
        content = to_json({**values, "slide_id": slide_id, "run_key": key})
        written = write_first(self.layout.slide(slide_id).slide_json, content)
        self._done.add(slide_id)
        if written:
            self.events.append("slide_done", slide_id=slide_id)
        return written

    def record_failure(self, slide_id: str, row: int, path: Path | Url | str, stage: str, reason: str) -> None:
        """Record that a slide, or an invalid row, failed in `stage`, and log it; the slide no longer counts as done.

        failures.csv is written only by `finish`. `slide_id`: id of the slide; for an invalid row, its name in messages.
        `row`: see `SlideRecord.row`. `path`: path or URL of the slide; empty for an invalid row. `reason`: message for
        the user. OSError if the log cannot be written.
        """
        self._failures.append(SlideFailure(slide_id, row, str(path), stage, reason))
        self._done.discard(slide_id)
        self.events.append("slide_failed", slide_id=slide_id, row=row, path=str(path), stage=stage, reason=reason)

    def quarantine(self, slide_id: str, key: str, stage: str, reason: str) -> None:
        """Write quarantine.json for a slide after one of its tasks failed too often; an existing file is replaced.

        The quarantine holds only for the run key `key`. `stage`: stage of the task. `reason`: message for failures.csv.
        OSError if the file cannot be written.
        """
        content = to_json({"run_key": key, "stage": stage, "reason": reason})
        write_atomically(self.layout.slide(slide_id).quarantine_json, content)

    def quarantined(self, slide_id: str, key: str) -> tuple[str, str] | None:
        """Return (stage, reason) of the slide's quarantine; None if it is not quarantined for the run key `key`.

        A corrupted quarantine.json counts as none. OSError if the file cannot be read.
        """
        stored = read_json(self.layout.slide(slide_id).quarantine_json) or {}
        if stored.get("run_key") != key or "stage" not in stored or "reason" not in stored:
            return None
        return stored["stage"], stored["reason"]

    def end_quarantine(self, slide_id: str) -> None:
        """Remove quarantine.json, if any, so that the slide is processed again. OSError if it cannot be removed."""
        _remove(self.layout.slide(slide_id).quarantine_json)

    def failures(self) -> tuple[SlideFailure, ...]:
        """Return the slides and invalid rows that failed since the run was last started, sorted by row."""
        return tuple(sorted(self._failures, key=lambda failure: failure.row))

    def finish(self, cohort: Cohort, model_busy: float | None = None, *, stopped: bool = False) -> None:
        """Write failures.csv and slides.csv at the end of the run, and log the end.

        `cohort`: slides for slides.csv. `model_busy`: fraction (0 to 1) of the time in which networks computed; None if
        nothing was predicted. `stopped`: whether the run ended early. OSError if a file cannot be written.
        """
        failures = self.failures()
        write_atomically(
            self.layout.failures_csv, _csv([f.name for f in fields(SlideFailure)], [astuple(f) for f in failures])
        )
        self.write_slides(cohort.records)
        ended = "run_stopped" if stopped else "run_finished"
        self.events.append(ended, done=len(self._done), failed=len(self._failures), model_busy=model_busy)

    def write_slides(self, records: Sequence[SlideRecord]) -> None:
        """Write slides.csv: the cohort's columns, extra ones included, and the row and status of each slide.

        The status is the first that applies of failed (since the last start), estimated (from a part of it), done,
        begun (unfinished work exists) and pending. OSError if slides.csv cannot be written or a file cannot be read.
        """
        extra = list(dict.fromkeys(name for record in records for name in record.extra))
        header = [*COLUMNS, *extra, *RUN_COLUMNS]
        failed = {failure.row for failure in self._failures}
        rows = []
        for record in records:
            slide = self.layout.slide(record.slide_id)
            status = "begun" if slide.key_json.is_file() else "pending"
            if record.row in failed:
                status = "failed"
            elif estimate_of(slide) is not None:
                status = "estimated"
            elif record.slide_id in self._done or nuclei_if_done(slide) is not None:
                status = "done"
            sizes = (record.mpp.x, record.mpp.y) if record.mpp else (None, None)
            cells = {
                **record.extra,
                **dict(zip(MPP_COLUMNS, sizes, strict=True)),
                "path": record.path,
                "slide_id": record.slide_id,
                "mpp": record.mpp.x if record.mpp and record.mpp.x == record.mpp.y else None,
                "magnification": record.magnification,
                "mask_path": record.mask_path,
                "patient_id": record.patient_id,
                "group": record.group,
                "row": record.row,
                "status": status,
            }
            rows.append([cells.get(name) for name in header])
        write_atomically(self.layout.slides_csv, _csv(header, rows))


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return the rows as the text of a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder with its content, and leftovers of killed writes."""
    remove_leftovers(path)
    remove(path)


def _remove_empty(folder: Path) -> None:
    """Remove an empty folder; others and links to folders stay."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()

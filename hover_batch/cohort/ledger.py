"""What a run's folder says about itself: which run it is, which slides are done, which failed.

The folder belongs to one run (weights, settings that change results, schema version) and is written by one process
at a time. A slide's work belongs to one run key; work of another key is removed, never mixed in.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import tomli_w

from hover_batch.cohort.events import EventLog
from hover_batch.cohort.layout import RunLayout, SlideLayout
from hover_batch.cohort.manifest import COLUMNS, RUN_COLUMNS, Cohort
from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.config import Settings
from hover_batch.errors import InputError, SettingsChanged
from hover_batch.files import remove_leftovers, to_json, write_atomically, write_first

RUN_FORMAT = "hover-batch run"
"""Stands in run.json, so that another program's run.json is not taken for ours."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

_LISTED = 10

_log = logging.getLogger(__name__)


def run_key(model_sha256: str, results_key: Mapping[str, Any], slide_fingerprint: str, schema_version: int) -> str:
    """Hex SHA-256 of all that a slide's results depend on: equal keys, equal results."""
    parts = {
        "model": model_sha256,
        "results": _plain(results_key),
        "slide": slide_fingerprint,
        "schema": schema_version,
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class ModelId:
    """Which weights a run uses."""

    id: str
    sha256: str


@dataclass(frozen=True)
class Failure:
    """A line of failures.csv. `stage` is where it failed, `reason` the text for the user."""

    slide_id: str
    row: int
    path: str
    stage: str
    reason: str


class Ledger:
    """The books of one run folder, open as a context manager: it is locked until the block, or the process, ends.

    InputError on entering where the folder cannot be written, holds something that is no run, or is in use.
    """

    def __init__(self, layout: RunLayout) -> None:
        self.layout = layout
        self._lock: int | None = None
        self._events: EventLog | None = None
        self._failures: list[Failure] = []
        self._done: set[str] = set()

    def __enter__(self) -> Self:
        root = self.layout.root
        try:
            str(root).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"--output {root}: its name is not UTF-8; name another folder") from error
        try:
            # Looked at before anything is written: not even a lock file goes into somebody else's folder.
            if root.is_dir():
                self._read_run()
            root.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.layout.lock, root)
            probe = root / f".probe-{uuid.uuid4().hex}"
            write_first(probe, b"can be written and linked\n")
            probe.unlink()
        except OSError as error:
            self._release()
            # os.link alone reports two names.
            reason = "its file system has no hard links" if error.filename2 is not None else error.strerror
            raise InputError(f"--output {root}: cannot be written ({reason}); name a folder that can") from error
        except InputError:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def events(self) -> EventLog:
        """The run's log of state changes; open from `start` on."""
        if self._events is None:
            raise RuntimeError("the ledger is not started")
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
        keys: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Begin the run, or go on with the one that is here; `settings` are those in effect, with "auto" resolved.
        `keys`: the run key of each slide_id.

        Writes run.json (when the run is new), settings.toml, versions.json and slides.csv. SettingsChanged where the
        folder holds a run whose results would differ; `force` removes that run's results first.
        """
        # Through JSON, so that it compares with what a file gives back.
        identity = json.loads(
            to_json(
                {
                    "model_id": model.id,
                    "model_sha256": model.sha256,
                    "results_key": _plain(settings.results_key()),
                    "schema_version": schema_version,
                }
            )
        )
        held = self._read_run()
        if force:
            self.clear()
        elif held is not None:
            _refuse_changes(self.layout.root, held, identity)
            self._refuse_other_slides(keys)
        if held is None or force:
            run = {
                **identity,
                "format": RUN_FORMAT,
                "results_key_sha256": hashlib.sha256(to_json(identity["results_key"])).hexdigest(),
                "cohort": cohort.source,
                "command": list(command),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            # First of all files: a folder with anything else and no run.json is taken for somebody else's.
            write_atomically(self.layout.run_json, to_json(run))
        write_atomically(self.layout.settings_toml, tomli_w.dumps(settings.to_dict()))
        write_atomically(self.layout.versions_json, to_json(dict(versions)))
        self.write_slides(cohort.records)
        self._events = EventLog(self.layout.events_jsonl)
        self.events.append(
            "run_started" if held is None or force else "run_resumed",
            command=list(command),
            slides=len(cohort.records),
            versions=dict(versions),
        )

    def _refuse_other_slides(self, keys: Mapping[str, str]) -> None:
        """SettingsChanged where a finished slide's id now stands for another file, pixel size or mask."""
        other = []
        for slide_id, key in keys.items():
            held = self._slide_json(slide_id)
            if held is not None and held.get("run_key") not in (None, key):
                other.append(slide_id)
        if other:
            listed = ", ".join(other[:_LISTED]) + (" …" if len(other) > _LISTED else "")
            raise SettingsChanged(
                f"--output {self.layout.root}: {listed}: finished there from another file, mpp or mask than the cohort "
                "now gives. Give such slides another slide_id or name another --output; --force removes all results "
                "there and starts anew."
            )

    def orphans(self, cohort: Cohort) -> list[str]:
        """Finished slides in the folder that this cohort does not have."""
        known = {record.slide_id for record in cohort.records}
        return [s.slide_id for s in self._slides() if s.slide_id not in known and s.slide_json.is_file()]

    def _slides(self) -> Iterator[SlideLayout]:
        """The slides that have a folder here, by name; folders of other names are none of ours."""
        for folder in sorted(self.layout.slides.iterdir()) if self.layout.slides.is_dir() else []:
            with contextlib.suppress(InputError):
                yield self.layout.slide(folder.name)

    def _slide_json(self, slide_id: str) -> dict[str, Any] | None:
        try:
            held = json.loads(self.layout.slide(slide_id).slide_json.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return held if isinstance(held, dict) else None

    def _read_run(self) -> dict[str, Any] | None:
        """run.json; None in a folder where nothing is; InputError where something is that is no run of ours."""
        root = self.layout.root
        try:
            run = json.loads(self.layout.run_json.read_bytes())
        except FileNotFoundError:
            # Hidden files do not count: our lock, a killed write, or what a desktop leaves in any folder. The slides of
            # --example are written before the run begins, and a cluster that is joined may have talked already.
            before = [path for path in (self.layout.example, self.layout.logs) if path.is_dir()]
            there = (entry for entry in root.iterdir() if not entry.name.startswith(".") and entry not in before)
            if names := sorted(entry.name for entry in there):
                raise InputError(
                    f"--output {root}: holds {names[0]} but no run.json, so it is no run's folder; name a new folder"
                ) from None
            return None
        except ValueError:
            run = None
        if not isinstance(run, dict) or run.get("format") != RUN_FORMAT:
            raise InputError(f"--output {root}: its run.json is not one of this program; name a new folder")
        return run

    def clear(self) -> None:
        """Remove all results that the layout names, and nothing else; run.json stays until `start` replaces it, so
        that a removal cut short leaves a folder that is still known as a run."""
        layout = self.layout
        for slide in self._slides():
            self._clear_slide(slide)
        _remove_empty(layout.slides)
        for path in (
            layout.summary_csv,
            layout.summary_parquet,
            layout.report_html,
            layout.report_slides,
            layout.slides_csv,
            layout.failures_csv,
            layout.settings_toml,
            layout.versions_json,
            layout.events_jsonl,
            layout.ray_log,
        ):
            _remove(path)
        _remove_empty(layout.logs)

    @staticmethod
    def _clear_slide(slide: SlideLayout) -> None:
        for path in slide.removal_order:
            _remove(path)
        _remove_empty(slide.folder)

    def open_slide(self, slide_id: str, key: str) -> SlideLayout:
        """The slide's folders, made, with unfinished work of this key in them and none of another.

        For a slide that `slide_done` has denied: a slide.json that is there all the same goes, or it would stand in
        the way of the true one.
        """
        slide = self.layout.slide(slide_id)
        mark = to_json({"run_key": key})
        if not (slide.key_json.is_file() and slide.key_json.read_bytes() == mark):
            if slide.folder.is_dir():
                self._clear_slide(slide)
            slide.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(slide.key_json, mark)
        _remove(slide.slide_json)
        slide.markers.mkdir(exist_ok=True)
        slide.parts.mkdir(exist_ok=True)
        return slide

    def slide_done(self, slide_id: str, key: str) -> bool:
        """Whether slide.json is there and tells of this run key, and the table beside it."""
        held = self._slide_json(slide_id)
        there = self.layout.slide(slide_id).nuclei_parquet.is_file()
        done = held is not None and held.get("run_key") == key and there
        if done:
            self._done.add(slide_id)
        return done

    def write_slide_json(self, slide_id: str, key: str, values: Mapping[str, Any]) -> bool:
        """Declare the slide done: its last file. False where another writer was first, whose word then stands."""
        content = to_json({**values, "slide_id": slide_id, "run_key": key})
        first = write_first(self.layout.slide(slide_id).slide_json, content)
        self._done.add(slide_id)
        if first:
            self.events.append("slide_done", slide_id=slide_id)
        return first

    def record_failure(self, slide_id: str, row: int, path: Path | Url | str, stage: str, reason: str) -> None:
        """Note that a slide, or a row that never became one, failed; failures.csv is written by `finish`."""
        self._failures.append(Failure(slide_id, row, str(path), stage, reason))
        self.events.append("slide_failed", slide_id=slide_id, row=row, path=str(path), stage=stage, reason=reason)

    def quarantine(self, slide_id: str, key: str, stage: str, reason: str) -> None:
        """Remember that processes die of this slide, under this run key: another file or model is another matter."""
        held = to_json({"run_key": key, "stage": stage, "reason": reason})
        write_atomically(self.layout.slide(slide_id).quarantine_json, held)

    def quarantined(self, slide_id: str, key: str) -> tuple[str, str] | None:
        """At which stage and why an earlier start of the run put the slide aside; None where it did not."""
        try:
            held = json.loads(self.layout.slide(slide_id).quarantine_json.read_bytes())
            return (held["stage"], held["reason"]) if held["run_key"] == key else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def release(self, slide_id: str) -> None:
        """Forget that the slide was put aside."""
        _remove(self.layout.slide(slide_id).quarantine_json)

    def failures(self) -> tuple[Failure, ...]:
        """Those of this start of the run, by row."""
        return tuple(sorted(self._failures, key=lambda failure: failure.row))

    def finish(self, cohort: Cohort, model_busy: float | None = None, *, stopped: bool = False) -> None:
        """Write failures.csv and slides.csv as things stand at the end of the run, or where it was `stopped` before it;
        `model_busy` (share of the time in which the networks computed) is for the log."""
        failures = self.failures()
        write_atomically(
            self.layout.failures_csv, _csv([f.name for f in fields(Failure)], [astuple(f) for f in failures])
        )
        self.write_slides(cohort.records)
        ended = "run_stopped" if stopped else "run_finished"
        self.events.append(ended, done=len(self._done), failed=len(self._failures), model_busy=model_busy)

    def write_slides(self, records: Sequence[SlideRecord]) -> None:
        """slides.csv: the cohort's columns and the extra ones, its row there, and done, failed or pending."""
        extra = list(dict.fromkeys(name for record in records for name in record.extra))
        header = [*COLUMNS, *extra, *RUN_COLUMNS]
        failed = {failure.row for failure in self._failures}
        rows = []
        for record in records:
            status = "failed" if record.row in failed else "pending"
            cells = {
                **record.extra,
                "path": record.path,
                "slide_id": record.slide_id,
                "mpp": record.mpp.x if record.mpp else None,
                "magnification": record.magnification,
                "mask_path": record.mask_path,
                "patient_id": record.patient_id,
                "group": record.group,
                "row": record.row,
                "status": "done" if record.slide_id in self._done else status,
            }
            rows.append([cells.get(name) for name in header])
        write_atomically(self.layout.slides_csv, _csv(header, rows))


def _lock(path: Path, root: Path) -> int:
    """The descriptor that holds the lock. The system drops it with the last process that has it open, killed or not;
    a forked child that outlives the run may still write, and rightly keeps it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise InputError(
            f"--output {root}: another run ({holder or 'unknown'}) is writing here; wait for it or name another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
        # Some cluster file systems are mounted without locks; that must not keep anyone from running.
        _log.warning("%s: this file system has no locks; take care that no second run writes here", root)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def is_locked(path: Path) -> bool | None:
    """Whether a run holds this lock file, asked without writing; None where the file system cannot tell.

    Nothing is kept: the shared lock by which it is asked is dropped at once.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _plain(value: Any) -> Any:
    """The same value with whole floats as integers: 8 in a settings file and the default 8.0 are one setting."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _refuse_changes(root: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """SettingsChanged with each difference, old → new. One model under two names is no change."""
    changes = []
    if held.get("model_sha256") != wanted["model_sha256"]:
        old, new = (f"{run.get('model_id')} (sha256 {str(run.get('model_sha256'))[:12]}…)" for run in (held, wanted))
        changes.append(f"  model: {old} → {new}")
    old_values = _flat({"schema_version": held.get("schema_version"), **held.get("results_key", {})})
    new_values = _flat({"schema_version": wanted["schema_version"], **wanted["results_key"]})
    for name in sorted(old_values.keys() | new_values.keys()):
        before, after = old_values.get(name, "not set"), new_values.get(name, "not set")
        if before != after:
            changes.append(f"  {name}: {before} → {after}")
    if changes:
        listed = "\n".join(changes)
        raise SettingsChanged(
            f"--output {root}: holds results of other settings (there → now):\n{listed}\n"
            "Name another --output, use the same settings, or --force to remove those results and start anew."
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as settings.toml has them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _remove(path: Path) -> None:
    """A file, a link (never what it points to) or a folder with all in it; and what killed writes of it left."""
    remove_leftovers(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    """Folders that still hold something else, and links to folders, stay."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()

"""Upload a run's results to a folder in cloud storage while the run goes on, each slide once it is done.

A slide is there when its slide.json is, which is uploaded last. Working files stay in the run's folder on disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hover_batch.bucket import BucketFolder, upload_tree
from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.record import Url
from hover_batch.cohort.run_folder import RUN_FORMAT, require_run
from hover_batch.cohort.run_key import refuse_changes, refuse_other_slides
from hover_batch.errors import HoverBatchError, InputError, TooManyFailures, UploadError
from hover_batch.executor.progress import CohortProgress
from hover_batch.files import json_object, read_json
from hover_batch.formatting import counted, listed

GIVE_UP_AFTER = 2
"""Slides in a row whose upload failed after which the others wait for the next finished slide, or the next start."""
LINE_EVERY_S = 10.0
"""Seconds between lines on the progress while the run waits for its uploads."""
STOP_WAIT_S = 5.0
"""Longest wait for the file that is being uploaded when the run is interrupted."""

_RUN = ""
"""Name of the files of the whole run, among the slide_ids."""


@dataclass(frozen=True)
class Uploaded:
    """Result of a run's uploads."""

    url: Url
    """Folder in cloud storage."""
    slides: int
    """Number of slides that are there."""
    left: Mapping[str, str]
    """Reason why something is not there, by slide_id; for the files of the whole run, by "the files of the run"."""

    def lines(self, root: Path, command: str) -> list[str]:
        """Return the result of the uploads as lines of text for the user.

        `root`: folder of the run. `command`: command line that the user repeats to upload the missing files.
        """
        there = f"{counted(self.slides, 'slide')} to {self.url}"
        if not self.left:
            return [f"uploaded: {there}"]
        return [
            f"uploaded: only {there}; missing: {listed(self.left)}",
            f"  {next(iter(self.left.values()))}",
            f"  nothing is lost, all results are in {root}; to upload the rest, repeat: {command}",
        ]


class RunUpload:
    """Uploads of one run, in a thread of their own. A failed upload does not fail its slide.

    Failed uploads are repeated each time that another slide is added, and once when the block ends. Once GIVE_UP_AFTER
    uploads in a row have failed with an UploadError, the others wait for the next time.

    Use it as a context manager. At the end of the block, it also uploads the files of the whole run, and waits. If the
    block raised an exception other than TooManyFailures, it stops instead, and waits at most STOP_WAIT_S seconds.

    `url`: folder in cloud storage. `layout`: paths of the run's results. InputError if the folder cannot be written.
    """

    def __init__(self, url: Url, layout: RunLayout) -> None:
        self._folder = BucketFolder(url)
        self._folder.check_writable()
        self._layout = layout
        self._progress: CohortProgress | None = None
        self._log: Callable[..., None] = lambda event, **values: None
        self._left: dict[str, str] = {}
        """Reason why the last attempt failed, by slide to be uploaded, or by _RUN; empty before the first attempt."""
        self._slides = self._uploaded = 0
        self._wake = threading.Event()
        self._ended = self._stopped = False
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)

    def begin(
        self, run_keys: Mapping[str, str], progress: CohortProgress, log: Callable[..., None], *, force: bool
    ) -> None:
        """Check that the folder is empty or holds this run, upload run.json, and start the thread that uploads.

        Call it once the run's own folder holds run.json.

        `run_keys`: run key of each slide by slide_id. `progress`: display of the progress. `log`: function that appends
        an event to the run's log. `force`: if True, remove the results in the folder first, instead of checking it;
        files that the layout does not name stay.

        InputError if the folder holds files but no run, cannot be read or cannot be written. SettingsChanged if it
        holds a run of other settings, or a finished slide with another run key. OSError if the log cannot be written or
        run.json cannot be read.
        """
        self._progress, self._log = progress, log
        try:
            if force:
                self._clear()
            else:
                self._refuse_others(run_keys)
            upload_tree(self._names([self._layout.run_json]), self._folder)
        except UploadError as error:  # before the run, it can be corrected
            raise InputError(str(error)) from error
        self._log("upload_started", url=str(self._folder.url))
        self._thread.start()

    def _refuse_others(self, run_keys: Mapping[str, str]) -> None:
        url, run_json = self._folder.url, self._layout.run_json.name
        content = self._folder.read([run_json]).get(run_json)
        if content is None:
            if names := self._folder.names():
                raise InputError(
                    f"--output {url}: holds {names[0]} but no run.json, so it is not the folder of a run; name a new "
                    "folder"
                )
            return
        stored = json_object(content) or {}
        if stored.get("format") != RUN_FORMAT:
            raise InputError(f"--output {url}: its run.json was written by another program; name another folder")
        refuse_changes(url, stored, require_run(self._layout))
        names_of = {self._name(self._layout.slide(slide_id).slide_json): slide_id for slide_id in run_keys}
        finished = {names_of[name]: json_object(held) or {} for name, held in self._folder.read(names_of).items()}
        refuse_other_slides(url, {slide_id: slide.get("run_key") for slide_id, slide in finished.items()}, run_keys)

    def _clear(self) -> None:
        """Remove the results of the run in the folder: each slide.json before its table.

        run.json stays until it is replaced, so that the folder still counts as a run if the removal is interrupted.
        """
        slide = self._layout.slide("any")
        of_run = {path.name for path in self._layout.kept if path != self._layout.run_json}
        of_slide = {path.name for path in slide.kept}
        first: list[str] = []
        others: list[str] = []
        for name in self._folder.names():
            top, *inside = name.split("/")
            if top == self._layout.slides.name and inside[1:] == [slide.slide_json.name]:
                first.append(name)
            elif top in of_run or (top == self._layout.slides.name and of_slide.intersection(inside[1:2])):
                others.append(name)
        self._folder.remove(first)
        self._folder.remove(others)

    def add(self, slide_id: str) -> None:
        """Queue the finished slide `slide_id` for upload, and show the progress. Return at once. Call `begin` first."""
        self._slides += 1
        self._left[slide_id] = ""
        self._wake.set()
        self._show()

    def result(self) -> Uploaded:
        """Return which slides were uploaded and what is missing. The result is final only after the `with` block."""
        left = {name or "the files of the run": reason for name, reason in self._left.items()}
        return Uploaded(self._folder.url, self._uploaded, left)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Upload the files of the whole run, too, and wait for all uploads; if the run was interrupted, stop them."""
        if not self._thread.is_alive():
            return
        try:
            if kind is None or issubclass(kind, TooManyFailures):
                self._left[_RUN] = ""
                self._ended = True
                self._wake.set()
                self._wait()
        finally:
            self._stopped = True
            self._wake.set()
            self._thread.join(STOP_WAIT_S)

    def _wait(self) -> None:
        printed = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.2)
            if time.monotonic() - printed >= LINE_EVERY_S:
                printed = time.monotonic()
                assert self._progress is not None
                self._progress.say(f"uploading to {self._folder.url}: {self._uploaded}/{self._slides} slides")

    def _show(self) -> None:
        assert self._progress is not None
        self._progress.show_uploads(self._uploaded, self._slides)

    def _work(self) -> None:
        while not self._stopped:
            self._wake.wait()
            self._wake.clear()
            ended = self._ended  # read before the pass, which then uploads all that was added
            self._upload_all()
            if ended:
                return

    def _upload_all(self) -> None:
        """Upload what is left, until GIVE_UP_AFTER uploads in a row have failed."""
        failed = 0
        for name in list(self._left):
            if self._stopped or failed == GIVE_UP_AFTER:
                return
            try:
                self._upload(name)
            except Exception as error:  # a failing upload must not end the thread, and so the uploads of other slides
                reason = str(error) if isinstance(error, HoverBatchError) else f"{type(error).__name__}: {error}"
                self._report(name, self._folder.url.without_secrets(reason))
                failed += isinstance(error, UploadError)  # others are not repeated, and cost no time
            else:
                failed = 0

    def _upload(self, name: str) -> None:
        if name == _RUN:
            upload_tree(self._names(self._layout.kept), self._folder)
            del self._left[name]
            return
        slide = self._layout.slide(name)
        stored = read_json(slide.slide_json) or {}
        sha256 = {self._name(slide.nuclei_parquet): stored["nuclei_sha256"]} if "nuclei_sha256" in stored else {}
        upload_tree(self._names(slide.kept), self._folder, self._name(slide.slide_json), sha256)
        if self._stopped:
            return
        self._log("slide_uploaded", slide_id=name)
        del self._left[name]
        self._uploaded += 1
        self._show()

    def _report(self, name: str, reason: str) -> None:
        """Keep the reason why an upload failed, and show it the first time."""
        if self._left[name] != reason and not self._stopped:
            assert self._progress is not None
            self._progress.warn(f"{name or 'the files of the run'}: not uploaded yet: {reason}")
        self._left[name] = reason

    def _names(self, paths: Iterable[Path]) -> dict[str, Path]:
        """Return those of the files that exist, and the files in the folders, by their names in cloud storage."""
        return {self._name(file): file for path in paths for file in _files(path)}

    def _name(self, path: Path) -> str:
        return path.relative_to(self._layout.root).as_posix()


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from (file for file in sorted(path.rglob("*")) if file.is_file())

"""Copies of slides from other storage on the disk of the machine that reads them.

    scratch/hover-batch-<user>/<run>.lock     shared by all processes of a run that are alive
    scratch/hover-batch-<user>/<run>/<slide_id>/<fingerprint>/<name>

A machine copies a slide once, whichever of its processes is first; the others wait for it. The copy goes when the slide
ends, all copies when the run does, and those of a run that was killed when another begins on the machine: the system
drops a lock with the process that held it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.errors import DISK_FULL, HoverBatchError, InputError, ScratchFull, SlideError
from hover_batch.files import replacing_folder
from hover_batch.slide.fingerprint import fingerprint
from hover_batch.slide.remote import files_of, storage_errors

ATTEMPTS = 4
FIRST_WAIT_S = 1.0
"""Wait before the second attempt; each is three times the last. The storage's library retries by itself, too."""
SPARED_BYTES = 256 << 20
"""Space left free on the scratch disk, which others use, too."""

_held: dict[Path, int] = {}
"""Lock file → the descriptor by which this process holds it."""
_holding = threading.Lock()


@dataclass(frozen=True)
class Copies:
    """Local copies of a run's slides on this machine.

    `scratch`: folder for them; if empty, the machine's folder for temporary files. `run`: name of the run's folder in
    it.
    """

    scratch: str
    run: str

    @classmethod
    def of_run(cls, root: Path, scratch: str) -> Self:
        """Return the copies of the run that writes into the output folder `root`.

        Only one run writes into a folder at a time.
        """
        return cls(scratch, hashlib.sha256(os.fsencode(root)).hexdigest()[:16])

    @property
    def _base(self) -> Path:
        return Path(self.scratch or tempfile.gettempdir()).absolute() / f"hover-batch-{os.getuid()}"

    @property
    def _folder(self) -> Path:
        return self._base / self.run

    @property
    def _lock(self) -> Path:
        return self._base / f"{self.run}.lock"

    @contextlib.contextmanager
    def staged(self, record: SlideRecord, planned: str) -> Iterator[SlideRecord]:
        """Yield the record with the path of a copy on this machine, which is fetched if it does not exist.

        A record of a slide on disk is yielded unchanged. `planned`: fingerprint that the copy must have. In errors that
        the block raises, the path of the copy is replaced by the URL.

        InputError or SlideError if the slide cannot be fetched or its fingerprint differs, ScratchFull if there is no
        space for the copy now.
        """
        if not isinstance(record.path, Url):
            yield record
            return
        self.open()
        folder = self._folder / record.slide_id / planned[:16]
        with _locked(self._folder / f".{record.slide_id}.lock"):
            if not folder.is_dir():
                self._fetch(record, record.path, planned, folder)
        copy = folder / record.path.name
        try:
            yield replace(record, path=copy)
        except HoverBatchError as error:
            raise type(error)(str(error).replace(str(copy), str(record.path))) from error

    def _fetch(self, record: SlideRecord, url: Url, planned: str, folder: Path) -> None:
        folder.parent.mkdir(exist_ok=True)
        wait = FIRST_WAIT_S
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with replacing_folder(folder) as partial:
                    partial.mkdir()
                    with storage_errors(url):
                        self._download(url, partial)
                    if fingerprint(partial / url.name, record.mpp) != planned:
                        raise SlideError(
                            f"{url}: what arrives is not what the storage had when the run was planned: changed "
                            "since, or damaged on the way; run the same command again"
                        )
                return
            except SlideError as error:
                if attempt == ATTEMPTS:
                    raise SlideError(f"{error} ({ATTEMPTS} attempts)") from error
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                raise ScratchFull(error.errno, os.strerror(error.errno), str(self._base)) from error
            time.sleep(wait)
            wait *= 3

    def _download(self, url: Url, folder: Path) -> None:
        storage, files = files_of(url)
        needed, disk = sum(file.size for file in files) + SPARED_BYTES, shutil.disk_usage(folder)
        if disk.total < needed:
            raise InputError(
                f"{url}: its {needed / 1e9:.1f} GB do not fit on the disk of {self._base}, were it empty; name a "
                "larger one by --scratch"
            )
        if disk.free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for file in files:
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            storage.get_file(file.key, str(folder / file.name))

    def open(self) -> None:
        """Lock the run's folder of copies on this machine until the process ends, and create it if it does not exist.

        The first call also removes copies of dead runs. InputError if the folder cannot be written, ScratchFull if its
        disk is full.
        """
        with _holding:
            if self._is_held():
                return
            try:
                self._base.mkdir(mode=0o700, parents=True, exist_ok=True)
                if self._base.stat(follow_symlinks=False).st_uid != os.getuid():
                    raise PermissionError(errno.EPERM, "belongs to another user")
                while not self._is_held():  # a sweep may have taken the file away before it was locked
                    descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    self._drop()
                    _held[self._lock] = descriptor
                    self._folder.mkdir(exist_ok=True)
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise ScratchFull(error.errno, error.strerror, str(self._base)) from error
                raise InputError(
                    f"--scratch {self._base.parent}: cannot be written ({error.strerror}); name a folder on a disk of "
                    "each machine"
                ) from error
            self._sweep()

    def _is_held(self) -> bool:
        descriptor = _held.get(self._lock)
        if descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(descriptor), self._lock.stat()) and self._folder.is_dir()
        except FileNotFoundError:
            return False

    def _drop(self) -> None:
        if (descriptor := _held.pop(self._lock, None)) is not None:
            os.close(descriptor)

    def _sweep(self) -> None:
        for lock in self._base.glob("*.lock"):
            if lock == self._lock:
                continue
            with contextlib.suppress(OSError), lock.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: somebody of that run is alive
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()

    def release(self, slide_id: str) -> None:
        """Remove the slide's copy on this machine. Processes that have it open can still read it."""
        shutil.rmtree(self._folder / slide_id, ignore_errors=True)

    def close(self) -> None:
        """Remove all copies of the run on this machine, and release its lock, when the run ends."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with _holding:
            self._lock.unlink(missing_ok=True)
            self._drop()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

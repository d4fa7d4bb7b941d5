"""Copies of slides from cloud storage on the disk of the machine that reads them.

scratch/hover-batch-<user>/<run>.lock shared by all live processes of a run
scratch/hover-batch-<user>/<run>/<slide_id>/<fingerprint>/<name>

Each machine copies a slide once: the first of its processes that needs it makes the copy, and the others wait. The copy
is removed when the slide is finished, and all copies when the run ends. Copies of a run that was killed are removed
when another run starts on the machine, since the system releases a lock when its process ends.
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

from hover_batch.bucket import storage_errors
from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.errors import DISK_FULL, HoverBatchError, InputError, ScratchFull, SlideError
from hover_batch.files import replacing_folder
from hover_batch.slide.fingerprint import fingerprint
from hover_batch.slide.remote import files_of

ATTEMPTS = 4
"""Maximum number of attempts to copy a slide."""
FIRST_WAIT_S = 1.0
"""Seconds before the second attempt; each wait is three times the previous one. The storage's library also retries."""
SPARED_BYTES = 256 << 20
"""Space left free on the scratch disk for other programs."""

_held: dict[Path, int] = {}
"""Descriptor by which this process holds a lock file, by lock file."""
_holding = threading.Lock()


@dataclass(frozen=True)
class Copies:
    """Copies of a run's slides on this machine; all processes of the run share them. Picklable and thread-safe."""

    scratch: str
    """Folder for the copies; "" for the machine's folder for temporary files."""
    run: str
    """Name of the run's folder in it."""

    @classmethod
    def of_run(cls, root: Path, scratch: str) -> Self:
        """Return the copies of the run with the output folder `root`. Nothing is created yet.

        `root`: absolute path of the folder, into which only one run writes at a time. `scratch`: folder for the copies;
        "" for the machine's folder for temporary files.
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
    def staged(self, record: SlideRecord, expected: str) -> Iterator[SlideRecord]:
        """Yield the record with the path of a copy on this machine, which is made if it does not exist.

        If another process is making the copy, wait for it. If copying fails with a SlideError, it is repeated, up to
        ATTEMPTS attempts in all. The copy stays until `release` or `close`. The run's folder of copies is opened first
        (see `open`). A HoverBatchError from the block is raised again with the URL in place of the copy's path in its
        message. For a slide on disk, the record is yielded unchanged, and nothing else is done.

        `record`: row of the slide in the cohort. `expected`: fingerprint that the copy must have.

        InputError if the slide does not exist, access is denied, it is larger than the disk, or the folder for copies
        cannot be used. SlideError if the slide cannot be copied or its fingerprint differs. ScratchFull if there is no
        space for the copy now, OSError if its folder or lock file cannot be created.
        """
        if not isinstance(record.path, Url):
            yield record
            return
        self.open()
        folder = self._folder / record.slide_id / expected[:16]
        with _locked(self._folder / f".{record.slide_id}.lock"):
            if not folder.is_dir():
                self._fetch(record, record.path, expected, folder)
        copy = folder / record.path.name
        try:
            yield replace(record, path=copy)
        except HoverBatchError as error:
            raise type(error)(str(error).replace(str(copy), str(record.path))) from error

    def _fetch(self, record: SlideRecord, url: Url, expected: str, folder: Path) -> None:
        folder.parent.mkdir(exist_ok=True)
        wait = FIRST_WAIT_S
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with replacing_folder(folder) as partial:
                    partial.mkdir()
                    with storage_errors(url):
                        self._download(url, partial)
                    if fingerprint(partial / url.name, record.mpp) != expected:
                        raise SlideError(
                            f"{url}: the copy differs from the file for which the run was planned: it was changed "
                            "since then, or corrupted in transfer; run the same command again"
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
                f"{url}: needs {needed / 1e9:.1f} GB, more than the whole disk of {self._base}; name a folder on a "
                "larger one with --scratch"
            )
        if disk.free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for file in files:
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            storage.get_file(file.key, str(folder / file.name))

    def open(self) -> None:
        """Create the run's folder of copies on this machine if it does not exist, and lock it.

        The lock is shared by all processes of the run; this process holds it until `close`, or until it ends. The call
        that takes the lock also removes copies that killed runs have left.

        InputError if the folder cannot be written or belongs to another user, ScratchFull if its disk is full.
        """
        with _holding:
            if self._is_held():
                return
            try:
                self._base.mkdir(mode=0o700, parents=True, exist_ok=True)
                if self._base.stat(follow_symlinks=False).st_uid != os.getuid():
                    raise PermissionError(errno.EPERM, "belongs to another user")
                while not self._is_held():  # another process may have removed the file before it was locked
                    descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    self._drop()
                    _held[self._lock] = descriptor
                    self._folder.mkdir(exist_ok=True)
            except OSError as error:
                if error.errno in DISK_FULL:
                    raise ScratchFull(error.errno, error.strerror, str(self._base)) from error
                raise InputError(
                    f"--scratch {self._base.parent}: cannot be written ({error.strerror}); name a folder that can be "
                    "written on each machine"
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
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: a process of that run is alive
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()

    def release(self, slide_id: str) -> None:
        """Remove the copy of the slide `slide_id` on this machine, if any; errors are ignored.

        Processes that have opened the copy can still read it.
        """
        shutil.rmtree(self._folder / slide_id, ignore_errors=True)

    def close(self) -> None:
        """Remove all copies of the run on this machine, and release this process's lock.

        Call it when the run ends. Errors while removing copies are ignored.

        OSError if the lock file cannot be removed.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        with _holding:
            self._lock.unlink(missing_ok=True)
            self._drop()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""Expected errors, and the exit codes of the commands that they end.

::

    HoverBatchError            exit code 1 unless a subclass overrides it
    ├── InputError             2: invalid input: CSV, settings, paths, headers, no Ray; the message names the remedy
    │   └── SettingsChanged    2: the output folder holds results made with other settings
    ├── SlideError             3: one slide cannot be opened or processed; the cohort continues
    │   └── SlideQuarantined   3: workers crashed repeatedly on it; skipped until the user asks for a retry
    ├── TooManyFailures        3: more slides failed than allowed; the cohort stops
    ├── UploadError            3: cloud storage cannot be read or written; results stay complete on disk
    └── PackageError           2: a model package or checkpoint cannot be used

`exit_code` has the codes of commands on many slides or runs; 130 is the code of an interrupted command.
"""

from __future__ import annotations

import errno
import re

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk and an exhausted quota, which are not faults of a slide."""

STORAGE_FAILED = (errno.EIO, errno.ESTALE, errno.EROFS, errno.EFBIG, errno.ETIMEDOUT, errno.EREMOTEIO)
"""Error numbers of a disk or network file system that failed or refuses to write; `write` does not name the file."""
UNUSABLE_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
"""Error numbers of paths that no file can have, or that lead to a folder where a file is expected, or the reverse. The
user must correct the command or the folder."""
LIBRARY = re.compile(r"\S+\.so[.\d]*: ")
"""How the dynamic loader begins its message; ctypes raises it as an OSError without a number."""
KILLED = re.compile("killed by signal|exited unexpectedly")
"""What torch says of a process that prepares batches and has died."""
OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|MemoryError", re.IGNORECASE)
"""What torch says if memory of the machine or the GPU has run out; not all of these errors have their own class."""


def file_fault(error: OSError) -> str:
    """Return one line that says what is wrong with a file, and what to do.

    `error`: OSError with an error number; its file name (`filename`), if it has one, begins the line.
    """
    remedy = "check that it can be read and written"
    if error.errno == errno.EISDIR:
        remedy = "a file belongs there: move or remove the folder"
    elif error.errno in (errno.ENOTDIR, errno.EEXIST):
        remedy = "a folder belongs there: move or remove the file"
    elif error.errno == errno.ENAMETOOLONG:
        remedy = "give a shorter path"
    elif error.errno == errno.ELOOP:
        remedy = "a link there leads to itself: give the path of the file or folder"
    elif error.errno == errno.EFBIG:
        remedy = "raise the limit of file sizes (ulimit -f), or write to a file system without such a limit"
    elif error.errno in STORAGE_FAILED:
        remedy = "check the disk or network file system, and run the same command again"
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror}; {remedy}"


def machine_fault(error: OSError | ImportError | MemoryError | RuntimeError) -> str | None:
    """Return one line that says what is wrong with this machine or its files, and what to do; None for other errors.

    Recognised are an OSError that names a file, a full disk, storage that failed, a native library that does not load,
    and memory of the machine or the GPU that runs out. `error`: error of the system, NumPy or torch, also one from a
    process that prepares batches.
    """
    text = str(error)
    doctor = "`hover-batch doctor` checks this machine and says what to do"
    if getattr(error, "errno", None) is None and LIBRARY.match(text):
        return f"a library does not load ({text}); {doctor}"
    if isinstance(error, OSError):
        if error.errno in DISK_FULL:
            return "no space left on disk; free some space and run the same command again"
        return None if error.filename is None and error.errno not in STORAGE_FAILED else file_fault(error)
    if "DataLoader worker" in text and KILLED.search(text):
        return (
            "a process that prepares batches was killed, usually because memory or shared memory ran out; free some, "
            "or give a smaller --batch, and a container --shm-size=2g; then run the same command again"
        )
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(text):
        reason = f" ({text.splitlines()[0]})" if text else ""
        return f"not enough memory{reason}; give smaller batches or images; {doctor}"
    return None


def exit_code(done: int, failed: int) -> int:
    """Return the exit code of a command on many slides or runs: 0 all done, 3 some failed, 4 none done.

    `done`, `failed`: numbers of slides or runs. If both are 0, the result is 4.
    """
    if not done:
        return 4
    return 3 if failed else 0


class ScratchFull(OSError):
    """The disk for copies of slides is full (`errno` is in DISK_FULL). `filename`: folder of the copies."""


class HoverBatchError(Exception):
    """Base class of all expected errors. The user sees the message unchanged, without a traceback."""

    exit_code = 1


class InputError(HoverBatchError):
    """Invalid input by the user, or a machine on which the command cannot start; usually found before anything runs."""

    exit_code = 2


class SettingsChanged(InputError):
    """The output folder holds results of other settings, which give other results."""


class SlideError(HoverBatchError):
    """A slide cannot be opened, read or processed; the other slides of the cohort can."""

    exit_code = 3


class SlideQuarantined(SlideError):
    """A task of the slide failed too often (crashes or lost nodes); it is not retried unless the user asks for it."""


class TooManyFailures(HoverBatchError):
    """More slides failed than --max-failures allows."""

    exit_code = 3


class UploadError(HoverBatchError):
    """Cloud storage could not be reached, read or written; files on disk are complete."""

    exit_code = 3


class PackageError(HoverBatchError):
    """A model package or checkpoint cannot be read or used."""

    exit_code = 2

"""Lock the folder of a run or a data set, so that only one process at a time writes to it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hover_batch.errors import InputError

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

_log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path, flag: str = "--output") -> Iterator[None]:
    """Lock the file `path` while the block runs; it is created if it does not exist.

    The process id and the host are written to the file. The lock is released when the block ends, or when the process
    is killed. Forked children keep it until they have ended, because they may still write. On a file system without
    locks, a warning is logged, and nothing is locked.

    `flag`: option that named the folder, for the message.

    InputError if another process holds the lock, OSError if the file cannot be opened, locked or written.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, path.parent, flag)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, flag: str) -> None:
    """Lock an open file. Errors as in `locked`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        raise InputError(
            f"{flag} {folder}: another run ({holder or 'unknown'}) is writing to it; wait for that run, or name "
            "another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        # Some cluster file systems are mounted without locks; runs must work there, too.
        _log.warning("%s: this file system has no locks; make sure that no second run writes there", folder)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def is_locked(path: Path) -> bool | None:
    """Return whether a process has locked the file `path`; None if this cannot be found out.

    False if the file does not exist. None if it cannot be opened, or its file system has no locks. Nothing is written:
    the test takes a shared lock and releases it at once.
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

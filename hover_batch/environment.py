"""Set environment variables for libraries that expect a user name and a writable home folder.

Containers often have neither: the installation and the home folder are read-only, and an arbitrary user id has no entry
in the password file. Then numba refuses to define a kernel (it finds no folder for compiled code), matplotlib warns,
and torch.compile cannot find the user's name. Numba and matplotlib read these variables when they are imported, so
`hover_batch` sets them on its own import.
"""

from __future__ import annotations

import getpass
import os

_CACHES = {"NUMBA_CACHE_DIR": "numba", "MPLCONFIGDIR": "matplotlib"}


def complete_environment() -> None:
    """Set LOGNAME, HOME, NUMBA_CACHE_DIR and MPLCONFIGDIR in os.environ where libraries need them and they are missing.

    LOGNAME is set to the user's id if the user has no name. Nothing else is set for a user with a home folder in which
    numba can write to its cache (~/.cache/numba, which is created for this test).

    For other users, the caches are put into a new or existing folder in the temporary directory that belongs to the
    user alone, since numba unpickles the files in its cache. If there is no home folder, HOME is set to this folder,
    too. If there is no temporary directory, these variables stay unset, since commands that compile nothing do not need
    them.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = str(os.getuid())
    has_home = os.path.expanduser("~") != "~"
    missing = [name for name in _CACHES if name not in os.environ]
    if has_home and (not missing or _user_cache_is_writable()):
        return
    try:
        folder = _private_folder()
    except OSError:
        return
    if not has_home:
        os.environ["HOME"] = folder
    for name in missing:
        os.environ[name] = os.path.join(folder, _CACHES[name])


def _user_cache_is_writable() -> bool:
    """Whether numba can write to the cache folder that it uses if the installation is read-only."""
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "numba")
    try:
        os.makedirs(folder, exist_ok=True)  # numba does the same; os.access cannot say whether it would succeed
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _private_folder() -> str:
    """Return a folder in the temporary directory that belongs to this user alone, the same for all processes.

    If the name is taken (by another user's folder or a link), return a new folder, which is removed at exit.
    """
    import atexit
    import contextlib
    import shutil
    import stat
    import tempfile

    folder = os.path.join(tempfile.gettempdir(), f"hover-batch-cache-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
        return folder
    folder = tempfile.mkdtemp(prefix="hover-batch-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder

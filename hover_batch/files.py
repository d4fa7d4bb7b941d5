"""Write files atomically and durably: a reader sees the old file or the new one, even after a kill or a power cut.

A write goes to a hidden temporary file in the same folder, which is synced to disk and renamed; then the folder is
synced, so that the new name survives, too. A killed write leaves its temporary file behind until `sweeping` or
`remove_leftovers` removes it. All functions raise OSError if a file cannot be read or written.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import uuid
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hover_batch.errors import InputError
from hover_batch.formatting import encoding_fault


def given_path(text: str) -> Path:
    """Return `text`, the value of an option or argument, as a path.

    ~ is expanded, as the shell does not after --out=. The file need not exist. InputError if the text is blank, or no
    file can have this name: it is not UTF-8, is too long, has a NUL character or is a link to itself.
    """
    if fault := encoding_fault(text):
        raise InputError(f"{text}: {fault}")
    if not text.strip():  # it would be the current folder
        raise InputError(
            'a path is empty, perhaps because a variable is not set; give the path, or "." for this folder'
        )
    path = Path(text).expanduser() if text == "~" or text.startswith("~/") else Path(text)
    try:
        path.stat()
    except ValueError as error:  # a NUL character
        raise InputError(f"{text!r:.200}: cannot be a path ({error}); correct it") from error
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(f"{text:.200}: cannot be used ({error.strerror}); give another path") from error
    return path


_SPECIAL = "is a device or a pipe, not a file; name a file"


def is_special(path: Path) -> bool:
    """Return whether `path` is a device, pipe or socket, or a link to one of this process, such as /dev/stdout.

    A read of them may never end, and nothing can replace them.
    """
    try:
        mode = path.stat().st_mode
    except OSError:  # such as a missing file
        return False
    special = not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))
    return special or (path.is_symlink() and os.readlink(path).startswith("/proc/"))


def nearest_existing(folder: Path) -> Path:
    """Return the absolute path of `folder`, or of its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def read_whole(path: Path) -> bytes:
    """Return the content of the file at `path`. OSError if it cannot be read, or is a device or a pipe."""
    if is_special(path):
        raise OSError(errno.EINVAL, _SPECIAL, str(path))
    return path.read_bytes()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path` for the block to write to.

    When the block ends, the file there is synced to disk and replaces `path`. If the block raises an exception, the
    file is removed, and `path` is unchanged. Each call has a name of its own, so that concurrent writers of one file do
    not use the same temporary file.

    OSError if the block wrote no file, or `path` cannot be replaced. Before the block, OSError if `path` is a device,
    pipe or socket, such as /dev/null, which would be gone for all programs.
    """
    if is_special(path):
        raise OSError(errno.EINVAL, _SPECIAL, str(path))
    with _temporary(path) as temporary:
        yield temporary
        _sync(temporary)
        try:
            os.replace(temporary, path)
        except OSError as error:  # its message would name the temporary file, such as when `path` is a folder
            raise OSError(error.errno, error.strerror, str(path)) from error
    _sync(path.parent)


_OF_RUN = ("slides", "logs", "run.json", "slides.csv", "summary.csv", "summary.parquet", "failures.csv")
"""Folders and files of a run in which other commands must not replace files."""


def _run_of(path: Path) -> Path | None:
    """Return the folder of the run to which the existing file `path` belongs; None if it belongs to none."""
    for folder in path.resolve().parents if path.exists() else ():
        if (folder / "run.json").is_file():
            return folder if path.resolve().relative_to(folder).parts[0] in _OF_RUN else None
    return None


def check_output_file(
    flag: str, path: Path, endings: tuple[str, ...], read: Iterable[Path] = (), *, make_folder: bool = False
) -> None:
    """Check, before long work, that `replacing` can write the file `path`; a file of the same name may exist.

    `flag`: option that gives the path, for the message. `endings`: suffixes that its name may have, in lower case, so
    that files of other kinds are not overwritten by mistake. `read`: files and folders that the command reads; `path`
    must not be in them. `make_folder`: create a missing folder of `path`.

    InputError if the file cannot be written, is one that the command reads, or belongs to a run.
    """
    folder = path.absolute().parent
    try:
        str(path).encode()  # pyarrow writes no file of another name
        if path.is_dir():
            raise InputError(f"{flag} {path}: is a folder; give the path of a file")
        if path.suffix.lower() not in endings:
            raise InputError(f"{flag} {path}: must end in {' or '.join(endings)}; change the ending")
        if make_folder:
            folder.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            raise InputError(f"{flag} {path}: the folder {folder} does not exist; create it first")
        if is_special(path):
            raise InputError(f"{flag} {path}: is a device or a pipe; give the path of a file")
        for used in map(Path.resolve, read):
            if used in (path.resolve(), *path.resolve().parents):
                where = "is" if used.is_file() else "is in"
                raise InputError(f"{flag} {path}: {where} {used}, which must not change; name another file")
        if run := _run_of(path):
            raise InputError(f"{flag} {path}: belongs to the run in {run}; name another file")
        temporary = _hidden_name(path)
        temporary.touch(exist_ok=False)  # os.access does not know read-only file systems and too long names
        temporary.unlink()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links; ValueError: not UTF-8
        reason = getattr(error, "strerror", None) or encoding_fault(str(path)) or str(error)
        raise InputError(
            f"{flag} {path}: cannot be written ({reason}); give a file in a folder that can be written"
        ) from error


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary path at which the block creates a folder. This folder then replaces the folder `path`, if any.

    Use it for folders that can be recreated: files are not synced, and for a moment during the replacement neither the
    old nor the new folder exists at `path`. The old folder is removed. If the block raises an exception, `path` is
    unchanged.

    FileNotFoundError if the block creates no folder, OSError if the folder cannot be moved.
    """
    temporary = _hidden_name(path)
    try:
        yield temporary
        if not temporary.is_dir():  # before the old folder is moved away
            raise FileNotFoundError(errno.ENOENT, "no folder was made to replace it", str(path))
        if path.exists():
            replaced = _hidden_name(path)
            os.replace(path, replaced)
            os.replace(temporary, path)
            shutil.rmtree(replaced)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(path.parent)


MAX_JSON_BYTES = 1 << 30
"""Largest uncompressed JSON file that is read, since a small gzip file can expand to terabytes."""


def load_json(path: Path) -> Any:
    """Return the parsed content of a JSON file, gzipped, zipped or plain, with or without a byte order mark.

    A zip archive must hold exactly one file, apart from the folder __MACOSX that macOS adds.

    ValueError if the content is not valid or larger than MAX_JSON_BYTES, RecursionError if it is nested too deeply,
    OSError if the file cannot be read.
    """
    content = read_whole(path)
    try:
        if content.startswith(b"\x1f\x8b"):
            with gzip.open(io.BytesIO(content)) as file:
                content = file.read(MAX_JSON_BYTES + 1)
        elif content.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(content)) as archive, archive.open(_only_file(archive)) as file:
                content = file.read(MAX_JSON_BYTES + 1)
    # zipfile raises RuntimeError for encrypted files, and NotImplementedError for unknown compressions.
    except (OSError, EOFError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"gzip or zip: {error}") from error
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"larger than {MAX_JSON_BYTES >> 20} MiB")
    return json.loads(content)


def _only_file(archive: zipfile.ZipFile) -> str:
    """Return the name of the archive's only file; macOS adds hidden ones."""
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise ValueError(f"a zip archive of {len(names)} files; one GeoJSON file is needed")
    return names[0]


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in the file at `path`; None if there is no such file or it holds no JSON object.

    OSError if the file cannot be read.
    """
    content = read_file(path)
    return None if content is None else json_object(content)


def read_file(path: Path) -> bytes | None:
    """Return the content of a file; None if it does not exist.

    If the file is replaced on NFS while it is read (ESTALE), it is read once more.

    OSError if the file cannot be read.
    """
    for _ in range(2):
        try:
            return read_whole(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # ESTALE: the file was replaced
                raise
            stale = error
    raise stale


def json_object(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object that `content` holds, as a dict; None if `content` is not a JSON object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_dicom(path: Path) -> bool:
    """Return whether `path` is a DICOM file, by its suffix or by its preamble, since many DICOM files have no suffix.

    A name that ends in .dcm suffices, even if there is no such file. False for hidden files, a DICOMDIR, and files
    without the suffix that cannot be read.
    """
    if path.name.startswith(".") or path.name == "DICOMDIR":
        return False
    if path.suffix.lower() == ".dcm":
        return True
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write or replace the file `path` in one step, as `replacing` does.

    `data`: content; text is encoded as UTF-8. OSError if the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_first(path: Path, data: bytes) -> bool:
    """Write the file `path`, synced to disk, unless it exists. Return whether this call wrote it.

    If several writers call it at once, exactly one of them gets True. The file system must have hard links.

    OSError if the file cannot be written.
    """
    with _temporary(path) as temporary:
        temporary.write_bytes(data)
        _sync(temporary)
        try:
            os.link(temporary, path)
            won = True
        except FileExistsError:
            # NFS may make the link, lose the answer and repeat the request: then the file has two names.
            won = os.stat(temporary).st_nlink > 1
    # The second writer syncs too, since it goes on as if the file were durable.
    _sync(path.parent)
    return won


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder with its content, if it exists. OSError if that fails."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def leftovers(path: Path) -> Iterator[Path]:
    """Yield the temporary files and folders beside `path` from writes of it that were killed or are still running."""
    return path.parent.glob(f".{path.name}.*.partial")


def remove_leftovers(path: Path) -> None:
    """Remove the `leftovers` of `path`. Call it only while nothing writes `path`. OSError if one cannot be removed."""
    for leftover in leftovers(path):
        remove(leftover)


@contextlib.contextmanager
def sweeping(path: Path) -> Iterator[None]:
    """Remove the `leftovers` of `path` before the block, which writes `path`.

    Nothing is removed while another such block is writing in the same folder, on this machine or on one that shares the
    file system's locks, or if the file system cannot lock folders. Errors while removing are ignored.

    OSError if the folder of `path` does not exist or cannot be opened.
    """
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        # Some network file systems cannot lock folders: leftovers stay there.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_leftovers(path)
        # A shared lock while the block writes, so that others may write, too, but not remove.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the name `path` to an OSError of the block that names no file, as those of failed writes and of pyarrow."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
            if "[errno" in str(error.strerror):  # pyarrow's sentence, which has the name of a temporary file
                error.strerror = os.strerror(error.errno)
        raise


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield an unused hidden path in the folder of `path`; remove the file there afterwards."""
    temporary = _hidden_name(path)
    try:
        with naming(path):
            yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _hidden_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def _sync(path: Path) -> None:
    """Sync a file's content, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not support fsync on folders; they write names through.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def to_json(value: Any) -> bytes:
    """Return `value` as indented JSON in UTF-8, with sorted keys, so that equal values give equal bytes.

    ValueError for NaN and infinity, TypeError for values that JSON does not support.
    """
    return (json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of the content of the file at `path` as 64 hex digits. OSError if it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

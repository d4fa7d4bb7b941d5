"""Folders in storage that fsspec supports (S3, GCS, Azure …), and uploads that resume where they stopped.

Credentials come from the environment, through the storage's own library. Messages redact credentials in URLs.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, TypeVar

from hover_batch.cohort.record import Url
from hover_batch.errors import DISK_FULL, HoverBatchError, InputError, SlideError, UploadError
from hover_batch.files import sha256_file

ATTEMPTS = 4
"""Maximum number of attempts of an upload, or of another request."""
FIRST_WAIT_S = 1.0
"""Seconds before the second attempt; each wait is three times the previous one. The storage's library also retries."""

_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")
"""Names of botocore's exceptions; it need not be installed."""

T = TypeVar("T")


def require_package(url: Url) -> None:
    """Check that fsspec supports the storage of `url`, and that the Python package that this needs is installed.

    InputError if not. For S3, the message contains the command that installs the package.
    """
    import fsspec

    try:
        fsspec.get_filesystem_class(url.protocol)
    except ImportError as error:
        s3 = url.protocol in ("s3", "s3a")
        remedy = "pip install 'hover-batch[s3]'" if s3 else "install it in the same environment"
        raise InputError(f"{url}: a package for {url.protocol}:// is missing ({error}); {remedy}") from error
    except ValueError as error:
        raise InputError(
            f"{url}: fsspec does not support storage of the kind {url.protocol}://; correct the path, or use a folder "
            "on disk"
        ) from error


@contextmanager
def storage_errors(
    url: Url,
    *,
    missing: str = "no such file in the storage",
    failed: str = "cannot be fetched",
    kind: type[HoverBatchError] = SlideError,
) -> Iterator[None]:
    """Convert exceptions that the storage library raises in the block to expected errors with one-line messages.

    The messages contain no credentials. HoverBatchErrors, and an OSError because the disk is full, are not converted.

    `url`: URL of the storage, for the message. `missing`: message if a file does not exist. `failed`: beginning of the
    message for other errors. `kind`: class of these errors.

    InputError if a file does not exist or access is denied, `kind` for all other exceptions.
    """
    try:
        yield
    except HoverBatchError:
        raise
    except Exception as raised:  # each library has exceptions of its own
        error: BaseException = raised
        if url.protocol in ("http", "https") and isinstance(raised, FileNotFoundError):
            error = raised.__cause__ or raised  # fsspec raises it for all failures
        status = getattr(error, "status", None)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            raise InputError(f"{url}: {missing}") from error
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = url.without_secrets(" ".join(str(error).split())) or type(error).__name__
        denied = isinstance(error, PermissionError) or status in (401, 403)
        if denied or type(error).__name__ in _NO_CREDENTIALS:
            raise InputError(
                f"{url}: access denied ({reason}); give credentials in the environment: for S3 AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, a profile, or the machine's role"
            ) from error
        raise kind(f"{url}: {failed}: {reason}") from error


def instead_of_url(url: Url) -> str:
    """Return advice for a user who gave `url` to a command that reads only folders, as a phrase for messages."""
    return (
        f"for results in a bucket, give the folder of --work, or fetch them, from S3 with `aws s3 cp --recursive {url} "
        "FOLDER`"
    )


def fetch_file(url: Url, path: Path) -> None:
    """Copy the file at `url` in cloud storage to `path` on disk. An existing file is replaced.

    InputError if the file does not exist, access is denied or a package for the storage is missing; SlideError if the
    file cannot be fetched; OSError if the disk is full.
    """
    import fsspec

    require_package(url)
    with storage_errors(url):
        storage, key = fsspec.url_to_fs(url.text)
        storage.get_file(key, str(path))


class BucketFolder:
    """Folder in cloud storage. Names of files in it are relative, with / between their parts.

    InputError if a package for the storage is missing, or the URL names no bucket. Methods raise InputError if access
    is denied or the bucket does not exist, and UploadError if the storage cannot be reached or refuses the request.
    """

    def __init__(self, url: Url) -> None:
        import fsspec

        require_package(url)
        self.url = url
        with self._errors():
            self._storage, root = fsspec.url_to_fs(url.text)
        self._root = str(root).rstrip("/")
        if not self._root:
            raise InputError(f"{url}: names no bucket; write {url.protocol}://BUCKET/FOLDER")

    def _errors(self, failed: str = "cannot be written") -> Any:
        missing = "no such bucket or folder; create it, or correct the URL"
        return storage_errors(self.url, missing=missing, failed=failed, kind=UploadError)

    def _reading(self, name: str) -> Any:
        missing = f"{name} does not exist any more; repeat the command"
        return storage_errors(self.url, missing=missing, failed=f"{name} cannot be read", kind=UploadError)

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    def check_writable(self) -> None:
        """Check that the folder can be written to: write the small file .probe, read it back and remove it.

        If the storage has folders and this one does not exist, it is created and remains; a bucket is not created.

        InputError if the file cannot be written, or has other content when it is read back, or the storage cannot be
        reached.
        """
        # Always the same name, so that one that a killed check left behind is removed.
        key, content = self._key(".probe"), b"can be written\n"
        try:
            with self._errors():
                self._in_folder(key, lambda: self._storage.pipe_file(key, content))
                if self._storage.cat_file(key) != content:
                    raise UploadError(
                        f"{self.url}: a file that was written there has other content when read back; check the storage"
                    )
                self._storage.rm_file(key)
        except UploadError as error:
            raise InputError(str(error)) from error

    def read(self, names: Collection[str]) -> dict[str, bytes]:
        """Return the content of each of the files `names`, by name. Files that do not exist are left out.

        InputError if access is denied, UploadError if a file cannot be read.
        """
        keys = {self._key(name): name for name in names}
        with self._errors("cannot be read"):
            self._storage.invalidate_cache()
            found = self._storage.cat(list(keys), on_error="return") if keys else {}
            for content in found.values():
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
        return {keys[key]: content for key, content in found.items() if isinstance(content, bytes)}

    def fetch(self, name: str, path: Path) -> None:
        """Copy the file `name` to `path` on disk. An existing file is replaced.

        InputError if the file does not exist or access is denied, UploadError if it cannot be read, OSError if the disk
        is full.
        """
        with self._reading(name):
            self._storage.get_file(self._key(name), str(path))

    def size(self, name: str) -> int:
        """Return the size of the file `name` in bytes.

        InputError if the file does not exist or access is denied, UploadError if it cannot be read.
        """
        with self._reading(name):
            return int(self._storage.info(self._key(name))["size"])

    def read_range(self, name: str, start: int | None, end: int | None) -> bytes:
        """Return a range of bytes of the file `name`.

        `start`: first byte; None for the beginning of the file. `end`: byte after the last; None for the end of the
        file.

        InputError if the file does not exist or access is denied, UploadError if it cannot be read.
        """
        with self._reading(name):
            return bytes(self._storage.cat_file(self._key(name), start=start, end=end))

    def modified(self, name: str) -> datetime:
        """Return the time at which the file `name` was uploaded, as a datetime with a time zone.

        InputError if the file does not exist or access is denied, UploadError if it cannot be read.
        """
        with self._reading(name):
            found: datetime = self._storage.modified(self._key(name))
            return found if found.tzinfo else found.replace(tzinfo=UTC)

    def names(self) -> list[str]:
        """Return the names of all files in the folder and its subfolders, sorted.

        InputError if access is denied or the bucket does not exist, UploadError if the files cannot be listed.
        """
        with self._errors("cannot be listed"):
            self._storage.invalidate_cache()
            return sorted(str(PurePosixPath(key).relative_to(self._root)) for key in self._storage.find(self._root))

    def remove(self, names: Collection[str]) -> None:
        """Remove the files `names`, which must exist.

        InputError if a file does not exist or access is denied, UploadError if one cannot be removed.
        """
        with self._errors():
            if names:
                self._storage.rm([self._key(name) for name in names])

    def put(self, files: Mapping[str, Path]) -> None:
        """Upload local files, which replace existing ones, and check that the stored files have the same content.

        Folders are created if the storage needs them; a bucket is not created.

        `files`: local paths by the names of the files in the folder.

        InputError if the bucket or a local file does not exist, or access is denied; UploadError if a file cannot be
        uploaded, or differs from the local one afterwards; OSError if a local file cannot be read for this comparison.
        """
        with self._errors():
            for name, path in files.items():
                key = self._key(name)
                self._in_folder(key, partial(self._storage.put_file, str(path), key))
        there = self.entries(files)
        for name, path in files.items():
            if not self.holds(there.get(name), path):
                raise UploadError(f"{self.url}/{name}: differs from {path} after its upload")

    def _in_folder(self, key: str, write: Callable[[], object]) -> None:
        """Call `write`, which writes `key`; if it needs the folder of `key`, create it. A bucket is not created."""
        try:
            write()
        except FileNotFoundError:  # SFTP, for example; in S3 there are no folders
            self._make_folder(key.rpartition("/")[0])
            write()

    def _make_folder(self, key: str) -> None:
        with suppress(FileExistsError):
            try:
                self._storage.mkdir(key, create_parents=False)
            except FileNotFoundError:
                if key == self._root:
                    raise
                self._make_folder(key.rpartition("/")[0])
                self._storage.mkdir(key, create_parents=False)

    def entries(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return what the storage reports about each of the files `names`, by name, for `holds`.

        Each value has the keys `name` and `size` (in bytes), and others that depend on the storage, such as `ETag`.
        Files that do not exist are left out.

        InputError if access is denied, UploadError if the folder cannot be listed.
        """
        keys = {self._key(name): name for name in names}
        entries: dict[str, dict[str, Any]] = {}
        with self._errors():
            self._storage.invalidate_cache()
            for folder in {key.rpartition("/")[0] for key in keys}:
                with suppress(FileNotFoundError):
                    entries |= {entry["name"]: entry for entry in self._storage.ls(folder, detail=True)}
        return {name: entries[key] for key, name in keys.items() if key in entries}

    def holds(self, entry: Mapping[str, Any] | None, path: Path, *, by_size: bool = False) -> bool:
        """Return whether a file in the folder has the same content as the local file `path`.

        If the sizes are equal, the content is compared by the MD5 that the storage reports. If it reports none or a
        different one (S3: large or encrypted files), the file is read back and compared by its SHA-256.

        `entry`: what `entries` returned for the file; None if the file does not exist. `by_size`: compare only the
        sizes.

        InputError if access is denied, UploadError if the file cannot be read back, OSError if the local file cannot be
        read.
        """
        if entry is None or entry["size"] != path.stat().st_size:
            return False
        if by_size:
            return True
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        # Of S3 and GCS. An ETag is not always an MD5, so a different one does not prove that the content differs.
        if entry.get("ETag", "").strip('"') == md5.hexdigest() or entry.get("md5Hash") == _base64(md5.digest()):
            return True
        with self._errors(), self._storage.open(entry["name"], "rb") as remote:
            return hashlib.file_digest(remote, "sha256").hexdigest() == sha256_file(path)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def upload_tree(
    files: Mapping[str, Path],
    folder: BucketFolder,
    last: str | None = None,
    sha256: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Upload local files, except those that the folder already holds with the same content; repeat the call to resume.

    Each file is compared with the local one after its upload. A failed upload is repeated (see `retried`).

    The file `last` is uploaded after the others, and an old one with other content is removed before them, so that its
    presence means that all files are there. If it is already there with the same content, the others are compared only
    by size.

    `files`: local paths by the names of the files in the folder. `last`: name of a file in `files`; None if no file
    marks the end. `sha256`: hex SHA-256 that local files must have, by name; it is checked before a file is uploaded.

    UploadError if all attempts fail. InputError if access is denied, the bucket or a local file does not exist, or a
    local file has another hash. OSError if a local file cannot be read.
    """
    retried(lambda: _upload(files, folder, last, sha256))


def retried(work: Callable[[], T]) -> T:
    """Call `work` and return its result. After an UploadError, call it again, up to ATTEMPTS times in all.

    The wait before the second attempt is FIRST_WAIT_S seconds; each further wait is three times as long.

    UploadError if all attempts fail. Other errors of `work` propagate at once.
    """
    wait = FIRST_WAIT_S
    for _ in range(ATTEMPTS - 1):
        with suppress(UploadError):
            return work()
        time.sleep(wait)
        wait *= 3
    try:
        return work()
    except UploadError as error:
        raise UploadError(f"{error} ({ATTEMPTS} attempts)") from error


def _upload(files: Mapping[str, Path], folder: BucketFolder, last: str | None, sha256: Mapping[str, str]) -> None:
    there = folder.entries(files)
    complete = last is not None and folder.holds(there.get(last), files[last])
    missing = {
        name: path
        for name, path in files.items()
        if name != last and not folder.holds(there.get(name), path, by_size=complete)
    }
    for name in missing.keys() & sha256.keys():
        if sha256_file(files[name]) != sha256[name]:
            raise InputError(
                f"{files[name]}: checksum mismatch; it was changed or corrupted, and is not uploaded: "
                "remove slide.json beside it, and repeat the segment command, which makes it again"
            )
    if last is not None and last in there and not complete:
        folder.remove([last])
    folder.put(missing)
    if last is not None and not complete:
        folder.put({last: files[last]})

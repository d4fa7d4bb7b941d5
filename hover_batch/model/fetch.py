"""Download published weights into the cache, by their name in tiatoolbox's repository or by a URL.

Files appear under their names only when complete. A file that the user placed there is used as well, for machines
without a network.
"""

from __future__ import annotations

import http.client
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hover_batch.errors import DISK_FULL, PackageError
from hover_batch.files import replacing, sweeping
from hover_batch.model.cache import check_download, download_path
from hover_batch.model.published import HUB, KINDS
from hover_batch.tiatoolbox_import import importing_tiatoolbox

_TIMEOUT_S = 60.0
"""Longest wait in seconds without data."""


def fetched(source: str, sha256: str | None = None) -> Path:
    """Return the path of the cached file of `source`; download it if it is not in the cache.

    The file's hash is recorded at its first use. A new download with another hash than expected is removed. If the
    environment variable HF_HUB_OFFLINE is 1, ON, YES or TRUE, nothing is downloaded.

    `source`: key of KINDS, or a URL with https (http only to this machine). `sha256`: expected SHA-256 in hex; by
    default the recorded one, if any.

    PackageError if the hash differs, the URL is not allowed, tiatoolbox does not have the model, or the file cannot be
    downloaded; in the last case the message says which file to copy and where. OSError if the disk is full, KeyError
    for an unknown name.
    """
    path = download_path(source)
    was_cached = path.is_file()
    if not was_cached:
        if "://" not in source and not KINDS[source].by_name:
            raise PackageError(
                f"{source}: not among tiatoolbox's models; download the authors' .pth (see {KINDS[source].source}) and "
                "import the file"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if "://" in source:
                _check_url(source)
                _download(source, path)
            else:
                _through_tiatoolbox(source, path)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise _cannot(source, path, error) from error
    try:
        check_download(path, sha256)
    except PackageError:
        if not was_cached:
            path.unlink()
        raise
    return path


def _check_url(url: str) -> None:
    """Raise PackageError for URLs without protection from tampering: anything but https, or http to this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")):
        raise PackageError(f"{url}: weights are downloaded from https://… only")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Redirect handler that checks every target, since a tampered response could redirect anywhere."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        try:
            _check_url(newurl)
        except PackageError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, as Hugging Face's client reads it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _download(url: str, path: Path) -> None:
    """Download `url` to `path`. OSError if it fails or is incomplete."""
    if _offline():
        raise OSError("HF_HUB_OFFLINE is set")
    try:
        with (
            urllib.request.build_opener(_Redirects).open(url, timeout=_TIMEOUT_S) as answer,
            sweeping(path),
            replacing(path) as temporary,
            temporary.open("wb") as file,
        ):
            if answer.headers.get_content_type() == "text/html":  # a login page, or a notice that the file has moved
                raise OSError("the server sent a web page instead")
            expected = answer.headers.get("Content-Length", "")
            shutil.copyfileobj(answer, file, 1 << 20)
            if expected.isdigit() and file.tell() != int(expected):
                raise OSError(f"the connection ended after {file.tell()} of {expected} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"{error.code} {error.reason}") from error
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(str(error) or type(error).__name__) from error


def _through_tiatoolbox(name: str, path: Path) -> None:
    """Download the weights `name` to `path` by tiatoolbox. OSError if that fails."""
    if _offline():
        raise OSError("HF_HUB_OFFLINE is set")
    with importing_tiatoolbox():
        from tiatoolbox.models import architecture
    try:
        architecture.fetch_pretrained_weights(name, path.parent)
    except Exception as error:  # many kinds, from the client and the network
        first: BaseException = error
        while first.__context__ is not None:  # the original cause, before the client's retries
            first = first.__context__
        raise OSError((str(first).strip() or type(first).__name__).splitlines()[0]) from error


def _cannot(source: str, path: Path, error: OSError) -> PackageError:
    url = source if "://" in source else f"{HUB}/resolve/main/{path.name}"
    return PackageError(
        f"{source}: cannot be downloaded ({getattr(error, 'reason', None) or error.strerror or error}); on a machine "
        f"with a network, download {path.name} ({url}), then import that file, or copy it to {path} and run this again"
    )

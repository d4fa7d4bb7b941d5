"""Published weights from the network into the cache: by a name that tiatoolbox's repository has, or by a URL.

A file takes its name when it is whole. One that somebody has put there by hand serves as well, so that machines without
a network are no special case.
"""

from __future__ import annotations

import http.client
import os
import shutil
import urllib.error
import urllib.request
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hover_batch.errors import DISK_FULL, PackageError
from hover_batch.files import replacing, sweeping
from hover_batch.model.cache import check_download, download_path
from hover_batch.model.published import HUB, KINDS

_TIMEOUT_S = 60.0
"""Without a byte."""


def fetched(source: str, sha256: str | None = None) -> Path:
    """The file of a published name or a URL in the cache, fetched unless it is there.

    `sha256`: what it must be; by default what it was when it was first used. Raises PackageError where it cannot be
    had, saying which file to bring where, or is another one.
    """
    path = download_path(source)
    there = path.is_file()
    if not there:
        if "://" not in source and not KINDS[source].by_name:
            raise PackageError(
                f"{source}: not among tiatoolbox's models; download the authors' .pth and import the file"
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
        if not there:
            path.unlink()
        raise
    return path


def _check_url(url: str) -> None:
    """PackageError where what arrives might be changed on the way."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")):
        raise PackageError(f"{url}: weights are fetched from https://… only")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Whoever may change one answer on the way could send on to wherever he likes: so every stop is checked."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str) -> Any:
        try:
            _check_url(newurl)
        except PackageError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _offline() -> bool:
    """As Hugging Face's client takes it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _download(url: str, path: Path) -> None:
    """OSError where it cannot be had whole."""
    if _offline():
        raise OSError("HF_HUB_OFFLINE is set")
    try:
        with (
            urllib.request.build_opener(_Redirects).open(url, timeout=_TIMEOUT_S) as answer,
            sweeping(path),
            replacing(path) as temporary,
            temporary.open("wb") as file,
        ):
            if answer.headers.get_content_type() == "text/html":  # to log in, or to say that it has moved
                raise OSError("a web page came in its place")
            promised = answer.headers.get("Content-Length", "")
            shutil.copyfileobj(answer, file, 1 << 20)
            if promised.isdigit() and file.tell() != int(promised):
                raise OSError(f"the connection ended after {file.tell()} of {promised} bytes")
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"{error.code} {error.reason}") from error
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(str(error) or type(error).__name__) from error


def _through_tiatoolbox(name: str, path: Path) -> None:
    """OSError where it cannot be had."""
    if _offline():
        raise OSError("HF_HUB_OFFLINE is set")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what tiatoolbox's import warns of concerns nobody here
        from tiatoolbox.models import architecture
    try:
        architecture.fetch_pretrained_weights(name, path.parent)
    except Exception as error:  # whatever the hub's client and the network raise
        first: BaseException = error
        while first.__context__ is not None:  # what went wrong before the client's retries did
            first = first.__context__
        raise OSError((str(first).strip() or type(first).__name__).splitlines()[0]) from error


def _cannot(source: str, path: Path, error: OSError) -> PackageError:
    url = source if "://" in source else f"{HUB}/resolve/main/{path.name}"
    return PackageError(
        f"{source}: cannot be fetched ({getattr(error, 'reason', None) or error.strerror or error}); where there is a "
        f"network, download {path.name} ({url}), then import that file, or bring it to {path} and run this again"
    )

"""S3 on loopback: moto's server, and a connection to it that can be broken."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import socketserver
import threading
import urllib.request
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

SECRET, KEY_ID = "planted-secret-key", "planted-key-id"

_connections: dict[str, dict[str, Any]] = {}
"""fsspec's file systems by what the environment says, since making one takes a tenth of a second."""


@functools.cache
def _started() -> str:
    """HOST:PORT of a server that runs until the process ends: each stop takes half a second."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    return f"{host}:{port}"


@contextlib.contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[str]:
    """HOST:PORT of a server without buckets. The environment tells it, and the credentials, as a user's would."""
    address = _started()
    try:
        settings = {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(home / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(home / "none"),
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        use(monkeypatch, address)
        reset(address)
        yield address
    finally:
        fsspec.get_filesystem_class("s3")._cache = {}


def use(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Reach S3 there from now on, as the environment says."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
    said = sorted(item for item in os.environ.items() if item[0].startswith("AWS_") and not item[0].endswith("_FILE"))
    connections = _connections.setdefault(repr(said), {})
    for storage in connections.values():
        storage.invalidate_cache()
    fsspec.get_filesystem_class("s3")._cache = connections


def reset(address: str) -> None:
    """Empty all buckets, which moto keeps as long as the process lives."""
    _post(address, "reset", b"")


def deny(address: str) -> None:
    """From the next request on, ask for credentials that this server gave out."""
    _post(address, "reset-auth", b"0")


def let_in(address: str) -> None:
    _post(address, "reset-auth", b"1000000")


def _post(address: str, name: str, body: bytes) -> None:
    # As a text: of a form, moto sees no body.
    url, headers = f"http://{address}/moto-api/{name}", {"Content-Type": "text/plain"}
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    urllib.request.urlopen(request).close()


def put(bucket: str, files: dict[str, bytes]) -> None:
    """These objects in the bucket, which is made."""
    storage = fsspec.filesystem("s3")
    if not storage.exists(bucket):
        storage.mkdir(bucket)
    for name, content in files.items():
        storage.pipe_file(f"{bucket}/{name}", content)


def names(bucket: str) -> list[str]:
    """Names of all objects in the bucket."""
    storage = fsspec.filesystem("s3")
    storage.invalidate_cache()
    return [key.removeprefix(f"{bucket}/") for key in storage.find(bucket)]


def contents(bucket: str) -> dict[str, bytes]:
    """All objects in the bucket."""
    return {name: fsspec.filesystem("s3").cat_file(f"{bucket}/{name}") for name in names(bucket)}


def reset_to(bucket: str, files: dict[str, bytes]) -> None:
    """These objects in the bucket, and no others."""
    if others := [f"{bucket}/{name}" for name in names(bucket) if name not in files]:
        fsspec.filesystem("s3").rm(others)
    put(bucket, files)


class Unreliable:
    """An fsspec file system of which some calls fail: those whose number, from 1 on, is in `failing`."""

    def __init__(self, storage: Any) -> None:
        self.storage = storage
        self.calls = 0
        self.failing: Container[int] = ()
        self.sent: list[str] = []
        """Keys that were uploaded, in order."""

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.storage, name)

        def call(*args: Any, **options: Any) -> Any:
            if name == "invalidate_cache":  # asks the storage for nothing
                return method(*args, **options)
            self.calls += 1
            if self.calls in self.failing:
                raise ConnectionResetError(f"connection to s3://me:{SECRET}@host lost")
            if name == "put_file":
                self.sent.append(args[1])
            return method(*args, **options)

        return call


def unreliable(monkeypatch: pytest.MonkeyPatch) -> Unreliable:
    """S3 for what is uploaded from now on."""
    storage = Unreliable(None)
    by_url = fsspec.url_to_fs

    def url_to_fs(url: str) -> tuple[Unreliable, str]:
        storage.storage, path = by_url(url)
        return storage, path

    monkeypatch.setattr(fsspec, "url_to_fs", url_to_fs)
    return storage


@contextlib.contextmanager
def breaking_line(address: str, times: int, after: int) -> Iterator[tuple[str, list[int]]]:
    """HOST:PORT of a proxy, and the lengths at which it broke: so many answers that are longer than `after` bytes."""
    host, _, port = address.rpartition(":")
    broke: list[int] = []

    class Line(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection((host, int(port))) as there:
                back = threading.Thread(target=self.pass_on, args=(self.request, there, False))
                back.start()
                self.pass_on(there, self.request, True)
                back.join()

        def pass_on(self, source: socket.socket, target: socket.socket, may_break: bool) -> None:
            passed = 0
            with contextlib.suppress(OSError):
                while content := source.recv(1 << 16):
                    passed += len(content)
                    if may_break and passed > after and len(broke) < times:
                        broke.append(passed)
                        break
                    target.sendall(content)
            for end in (source, target):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    class Lines(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Lines(("127.0.0.1", 0), Line) as proxy:
        serving = threading.Thread(target=proxy.serve_forever, args=(0.05,))
        serving.start()
        try:
            yield f"127.0.0.1:{proxy.server_address[1]}", broke
        finally:
            proxy.shutdown()
            serving.join()

"""S3 on loopback: moto's server, for tests of slides that lie in buckets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

SECRET = "planted-secret-key"
KEY_ID = "planted-key-id"


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[str]:
    """The endpoint; the environment says it, and the credentials, as a user's would."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        settings = {
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_CONFIG_FILE": str(home / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(home / "none"),
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        yield settings["AWS_ENDPOINT_URL"]
    finally:
        server.stop()


def put(bucket: str, **files: bytes) -> None:
    """Make the bucket, with these objects."""
    storage = fsspec.filesystem("s3", skip_instance_cache=True)
    if not storage.exists(bucket):
        storage.mkdir(bucket)
    for name, content in files.items():
        storage.pipe_file(f"{bucket}/{name}", content)

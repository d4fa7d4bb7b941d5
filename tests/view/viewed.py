"""A run of `view` that answers in a thread of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hover_batch.view.command import serve
from hover_batch.view.server import Server


@contextmanager
def viewing(run: Path, slide_id: str | None = None) -> Iterator[tuple[Server, list[str]]]:
    """The server, and what it told."""
    told: list[str] = []
    server = serve(run, slide_id, 0, told.append)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server, told
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

"""Run `view` in a thread of the test, or as a command."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hover_batch.view.serve import serve
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


@contextmanager
def command(run: Path, *arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address that it printed."""
    with subprocess.Popen(
        [sys.executable, "-c", "from hover_batch.cli import app; app()", "view", str(run), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    ) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()

"""End a running query of DuckDB at Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator

import duckdb


@contextlib.contextmanager
def ended_by_ctrl_c(connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Let Ctrl-C end the queries that `connection` runs in the block. Use it in the main thread.

    DuckDB looks for signals only in the thread that asked, and then waits for its other threads, which may go on to the
    end of the query. `interrupt` stops all of them. It must be called from another thread, because Python runs no
    handler of signals while the main thread is in DuckDB.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def interrupt() -> None:
        while number := reader.recv(1):
            if number[0] == signal.SIGINT:
                connection.interrupt()

    listener = threading.Thread(target=interrupt, name="ctrl-c", daemon=True)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()
        listener.join()
        reader.close()

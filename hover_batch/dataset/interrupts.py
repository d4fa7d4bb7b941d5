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
    """Let Ctrl-C end the queries that `connection` runs in the block at once. Use it in the main thread.

    Without it, DuckDB checks for signals only in the thread that runs the query, and then waits for its other threads,
    which may continue to the end of the query. In the block, a thread waits for SIGINT and calls
    `connection.interrupt`, which stops all of them. It must be another thread, because Python runs no signal handler
    while the main thread is in DuckDB.

    The block sets the process's file descriptor for signals (`signal.set_wakeup_fd`), and restores the previous one.
    ValueError if it is used in another thread.
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

"""Ctrl-C while a cohort runs."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def on_ctrl_c(call: Callable[[], None]) -> Iterator[None]:
    """Within the block, Ctrl-C calls `call` instead of raising KeyboardInterrupt. In other threads than the main one,
    which alone gets signals, nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        call()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

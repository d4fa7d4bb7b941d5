"""Interruptions of a command: Ctrl-C, and the signals by which schedulers and terminals end a process."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; what SLURM, Kubernetes and `docker stop` send before they kill; the loss of the terminal."""


def raise_interrupt() -> None:
    """Raise KeyboardInterrupt, as Python does when the user presses Ctrl-C."""
    raise KeyboardInterrupt


def restore_default_actions() -> None:
    """Restore the default action of each of SIGNALS: to end the process. Signals that are ignored stay ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def on_interrupt(action: Callable[[], None] = raise_interrupt) -> Iterator[None]:
    """Call `action` whenever one of SIGNALS arrives while the block runs, and restore the previous handlers afterwards.

    Signals that the process ignores stay ignored, such as SIGHUP under nohup. Only the main thread can set handlers; in
    other threads, the block runs without them.

    `action`: called in the signal handler; an exception that it raises is raised in the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        action()

    previous_handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in previous_handlers.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python

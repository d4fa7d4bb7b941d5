"""Start the program. This takes a second or two, in which Ctrl-C ends it without a traceback, too."""

from __future__ import annotations

import gc
import os
import sys

GC_THRESHOLDS = (50_000, 20, 20)
"""Allocations of each generation between garbage collections.

The imports create hundreds of thousands of objects that stay. With Python's defaults (700, 10, 10), much of the
start-up is spent on searching them for garbage.
"""


def main() -> None:
    """Run the command line with the arguments of this process, and exit with the code of the command.

    The thresholds of Python's garbage collector are raised to GC_THRESHOLDS. The exit code is 130 if Ctrl-C is pressed
    while the program starts, and 2 if the current folder was removed. Afterwards, signals such as Ctrl-C end the
    process at once.
    """
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        os.getcwd()
    except FileNotFoundError:  # libraries would fail in many ways
        print("Error: the current folder does not exist any more; change to another one with cd", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        from hover_batch.cli import app

        app()  # builds all commands before it handles Ctrl-C itself
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        from hover_batch.executor.interrupts import restore_default_actions

        restore_default_actions()  # Ctrl-C while Python shuts down would print a traceback


if __name__ == "__main__":
    main()

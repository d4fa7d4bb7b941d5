"""Import tiatoolbox without the side effects of its import."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def importing_tiatoolbox() -> Iterator[None]:
    """While tiatoolbox is imported in the block, suppress Python's warnings and the side effects on logging.

    tiatoolbox sends the root logger's messages to stdout, where results belong, redirects Python's warnings to the log,
    and leaves a file open, which gives a ResourceWarning. After the first import, logging.captureWarnings is switched
    off. Not thread-safe, since the root logger and the warning filters belong to the process.
    """
    first = "tiatoolbox" not in sys.modules
    root, guard = logging.getLogger(), logging.NullHandler()
    root.addHandler(guard)  # tiatoolbox does not change a root logger that has a handler
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
            if first:
                logging.captureWarnings(False)
    finally:
        root.removeHandler(guard)

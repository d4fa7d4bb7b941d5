"""What can go wrong, and the exit code that says so.

::

    HoverBatchError            exit code 1 unless a subclass says otherwise
    ├── InputError             2: seen before anything ran: CSV, settings, paths, headers; the message names the remedy
    │   └── SettingsChanged    2: the output folder holds results of other settings
    ├── SlideError             3: one slide cannot be opened or processed; the cohort goes on
    │   └── SlideQuarantined   3: processes died of it, time and again; it is left alone until told otherwise
    ├── TooManyFailures        3: more slides failed than were allowed; the cohort stops
    └── PackageError           2: a model package or checkpoint cannot be used

Exit code 4 (nothing could be processed) and 130 (interrupted) are decided by the commands, not by an exception.
"""

from __future__ import annotations

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Numbers of the OSErrors that blame no slide: there is no space, or no more of it for this user."""


class ScratchFull(OSError):
    """ENOSPC where slides are copied to; `filename` is that folder."""


class HoverBatchError(Exception):
    """Base of all errors raised on purpose. Its text is shown to the user as it is, without a traceback."""

    exit_code = 1


class InputError(HoverBatchError):
    """Something the user gave is wrong; nothing was run."""

    exit_code = 2


class SettingsChanged(InputError):
    """The output folder was made with settings that give other results."""


class SlideError(HoverBatchError):
    """A slide cannot be opened, read or processed."""

    exit_code = 3


class SlideQuarantined(SlideError):
    """Processes died of a slide, time and again: it is not tried again unless the user says so."""


class TooManyFailures(HoverBatchError):
    """More slides failed than --max-failures allows."""

    exit_code = 3


class PackageError(HoverBatchError):
    """A model package or checkpoint cannot be read or does not fit."""

    exit_code = 2

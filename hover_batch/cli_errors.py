"""Report errors of commands as messages and exit codes, and respect the terminal's encoding and NO_COLOR."""

from __future__ import annotations

import inspect
import io
import os
import re
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from hover_batch.errors import UNUSABLE_PATH, HoverBatchError, InputError, machine_fault
from hover_batch.executor.interrupts import on_interrupt
from hover_batch.logs import LogFormat, json_line


class _Dropping(io.RawIOBase):
    """Stream that writes to `raw`, and drops what cannot be written, so that a command ends as it would otherwise.

    This is the case after its reader, such as `head`, has closed the pipe. If `always` is set, errors of all kinds
    count, such as a full disk: it is for messages on stderr.
    """

    def __init__(self, raw: io.FileIO, *, always: bool) -> None:
        self._raw = raw
        self._always = always

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._raw.isatty()

    def fileno(self) -> int:
        return self._raw.fileno()

    def write(self, data: Any) -> int | None:
        try:
            return self._raw.write(data) if len(data) else 0  # click tries it, and ignores errors
        except OSError as error:
            if self._always or isinstance(error, BrokenPipeError):
                return len(data)
            self._always = True  # Python writes the rest of its buffer at exit, and would report the error again
            raise


def _tolerant(stream: Any) -> Any:
    """Return stdout or stderr as a stream that drops what cannot be written, and escapes what cannot be encoded."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors="backslashreplace")  # else µ and → raise an error on a terminal that is not UTF-8
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(raw, io.FileIO):  # a test's
        return stream
    dropping = _Dropping(raw, always=stream is sys.stderr)
    buffer: Any = dropping if raw is stream.buffer else io.BufferedWriter(dropping)  # raw with python -u
    return io.TextIOWrapper(
        buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering, write_through=stream.write_through
    )


class CommandGroup(TyperGroup):
    """Group of all commands.

    A HoverBatchError, a file that cannot be used, a full disk and Ctrl-C end the program with one message and their
    exit code.
    """

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        _join_lines(self)

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line, with the arguments and the result of typer's `main`. It usually ends with SystemExit.

        sys.stdout and sys.stderr are replaced. Characters that the terminal cannot encode are printed as escapes.
        Output to a closed pipe and messages that cannot be written to stderr are dropped. If NO_COLOR is set, the
        environment variable TERM is set to dumb, so that output has neither colours nor cursor movements.
        """
        sys.stdout, sys.stderr = _tolerant(sys.stdout), _tolerant(sys.stderr)
        if os.environ.get("NO_COLOR"):
            # By itself, rich leaves out only the colours; it would still print bold text and move the cursor.
            os.environ["TERM"] = "dumb"
            extra["color"] = False
        return super().main(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command of `ctx`. On an expected error, print its message to stderr and exit with its exit code.

        It exits by raising typer.Exit. Expected are HoverBatchError, what `machine_fault` recognises, such as a full
        disk, and KeyboardInterrupt (exit code 130). Other exceptions propagate. While the command runs, SIGTERM and
        SIGHUP raise KeyboardInterrupt, as Ctrl-C does.
        """
        try:
            with on_interrupt():
                return super().invoke(ctx)
        except HoverBatchError as error:
            _say(ctx, f"Error: {error}", error.exit_code)
            raise typer.Exit(error.exit_code) from error
        except (OSError, ImportError, MemoryError, RuntimeError) as error:
            if (message := machine_fault(error)) is None:
                raise
            is_input = getattr(error, "errno", None) in UNUSABLE_PATH
            exit_code = (InputError if is_input else HoverBatchError).exit_code
            _say(ctx, f"Error: {message}", exit_code)
            raise typer.Exit(exit_code) from error
        except KeyboardInterrupt as error:
            _say(ctx, "Interrupted. Finished work is kept: run the same command again to resume.", 130)
            raise typer.Exit(130) from error


def _join_lines(group: TyperGroup) -> None:
    """Join the lines of each paragraph of the commands' help, since rich keeps the line breaks of the source code."""
    for command in group.commands.values():
        if command.help:
            command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(command.help))
        if isinstance(command, TyperGroup):
            _join_lines(command)


def _say(ctx: Any, message: str, exit_code: int) -> None:
    """Print why a command ended on stderr, in the command's log format if it has one, else as text."""
    line = json_line("error", message.removeprefix("Error: "), exit_code=exit_code)
    typer.echo(line if ctx.obj is LogFormat.json else message, err=True)

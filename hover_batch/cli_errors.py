"""Report errors of commands as messages and exit codes, and respect the terminal's encoding and NO_COLOR."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from hover_batch.errors import DISK_FULL, HoverBatchError, file_fault
from hover_batch.executor.interrupts import on_interrupt
from hover_batch.logs import LogFormat, json_line


class CommandGroup(TyperGroup):
    """Group of all commands.

    A HoverBatchError, a file that cannot be used, a full disk and Ctrl-C end the program with one message and their
    exit code.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line. Arguments and result are those of typer's `main`.

        Without colours and cursor movements if NO_COLOR is set.
        """
        if os.environ.get("NO_COLOR"):
            # By itself, rich leaves out only the colours; it would still print bold text and move the cursor.
            os.environ["TERM"] = "dumb"
            extra["color"] = False
        return super().main(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; on an expected error, print its message to stderr and raise typer.Exit with its exit code.

        Expected are HoverBatchError, an OSError that names a file or means a full disk, and KeyboardInterrupt (130).
        Characters that the terminal cannot encode are printed as escapes.
        """
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # else µ and → raise an error on a terminal that is not UTF-8
                stream.reconfigure(errors="backslashreplace")
        try:
            with on_interrupt():
                return super().invoke(ctx)
        except HoverBatchError as error:
            _say(ctx, f"Error: {error}", error.exit_code)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if error.errno in DISK_FULL:
                message = "Error: no space left on disk; free some space and run the same command again"
            elif error.filename is not None:
                message = f"Error: {file_fault(error)}"
            else:
                raise
            _say(ctx, message, HoverBatchError.exit_code)
            raise typer.Exit(HoverBatchError.exit_code) from error
        except KeyboardInterrupt as error:
            _say(ctx, "Interrupted. Finished work is kept: run the same command again to resume.", 130)
            raise typer.Exit(130) from error


def _say(ctx: Any, message: str, exit_code: int) -> None:
    """Print why a command ended on stderr, in the command's log format if it has one, else as text."""
    line = json_line("error", message.removeprefix("Error: "), exit_code=exit_code)
    typer.echo(line if ctx.obj is LogFormat.json else message, err=True)

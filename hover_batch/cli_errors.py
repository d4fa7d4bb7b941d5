"""All commands together: how they speak on a terminal that wants no colour, and how they end: errors to exit codes."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from hover_batch.errors import DISK_FULL, HoverBatchError
from hover_batch.logs import LogFormat, json_line


class Commands(TyperGroup):
    """All commands, kd's among them: what is raised on purpose becomes one clear message and its exit code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        if os.environ.get("NO_COLOR"):
            # rich leaves out colours alone, and would still print in bold and move the cursor.
            os.environ["TERM"] = "dumb"
            extra["color"] = False
        return super().main(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # else µ and → would end a run where the terminal is not UTF-8
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except HoverBatchError as error:
            _say(ctx, f"Error: {error}", error.exit_code)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            message = "Error: no space left on disk; free some and run the same command again"
            _say(ctx, message, HoverBatchError.exit_code)
            raise typer.Exit(HoverBatchError.exit_code) from error
        except KeyboardInterrupt as error:
            _say(ctx, "Interrupted. Nothing done is lost: give the same command again.", 130)
            raise typer.Exit(130) from error


def _say(ctx: Any, message: str, exit_code: int) -> None:
    """How a command ended, in its log format, if it has one."""
    line = json_line("error", message.removeprefix("Error: "), exit_code=exit_code)
    typer.echo(line if ctx.obj is LogFormat.json else message, err=True)

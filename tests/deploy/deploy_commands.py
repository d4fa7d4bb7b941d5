"""Commands in the files of deploy/, parsed with the programs' own parsers without running them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def options(words: list[str]) -> dict[str, Any]:
    """What `hover-batch` or `ray`, the first of `words`, understands of the others. Raises click's UsageError."""
    command, name, rest = _program(words[0]), words[0], words[1:]
    with command.make_context(name, ["--help"], resilient_parsing=True) as context:
        while hasattr(command, "get_command"):
            if name == "cohort" and rest[0] not in command.commands:
                rest = ["build", *rest]
            name, rest = rest[0], rest[1:]
            command = command.get_command(context, name)
            assert command, f"{' '.join(words)}: there is no {name}"
    with command.make_context(name, list(rest)) as context:
        return dict(context.params)


def _program(name: str) -> Any:
    if name == "hover-batch":
        from typer.main import get_command

        from hover_batch.cli import app

        return get_command(app)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what Ray's command line imports
        from ray.scripts.scripts import cli

        return cli


def commands(shell: str) -> Iterator[list[str]]:
    """The commands of ours and of Ray's in a piece of shell, each as its words, also those inside of others.

    What follows the image of `docker run`, and `slurm.sh`, is hover-batch's.
    """
    for line in shell.replace("\\\n", " ").splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", "&", "|", ">", ";"):
                yield from _of_ours(command)
                command = []
            else:
                command.append(word)


def _of_ours(command: list[str]) -> Iterator[list[str]]:
    for number, word in enumerate(command):
        before, after = command[:number], command[number + 1 :]
        name = word.split("/")[-1]
        if " " in word:
            yield from commands(word)
        elif name in ("hover-batch", "ray") and (before[-1:] == ["--"] or all(_leads_on(b) for b in before)):
            yield [name, *after]
        elif word.startswith("hover-batch:") and "run" in before:
            yield ["hover-batch", *after]
        elif name == "slurm.sh":
            yield ["hover-batch", "segment", *after]


def _leads_on(word: str) -> bool:
    """Whether it may stand before a program's name."""
    return "=" in word or word in ("uv", "run", "--with", "boto3")


def blocks(markdown: str) -> list[str]:
    """The fenced pieces of shell in a document."""
    return re.findall(r"^```sh\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)


def check_shell(script: str) -> None:
    """Bash and shellcheck find nothing; the second is left out, saying so, where it is not installed."""
    parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed: bash alone has looked at the script")
    checked = subprocess.run([shellcheck, "--shell=bash", "-"], input=script, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout

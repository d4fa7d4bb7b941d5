"""`hover-batch doctor`: check that this machine has what a run needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hover_batch.commands.options import local_path
from hover_batch.errors import InputError


def doctor(
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder for a run: check that it can be written and has free space.",
            parser=local_path,
        ),
    ] = Path("hover-batch-out"),
    start_ray: Annotated[
        bool, typer.Option("--ray", help="Also start Ray, as a run does, for one task; takes a minute at most.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for other programs.")] = False,
) -> None:
    """Check that this machine has what a run needs.

    Prints PASS, WARN or FAIL for each check, and for WARN and FAIL how to fix the problem.

    Exit codes: 0 no check failed (there may be warnings), 2 at least one check failed.

    Example:

    hover-batch doctor -o /data/out --ray
    """
    from hover_batch.doctor import checks

    findings = []
    for check in checks(output, start_ray=start_ray):
        finding = check.run()
        findings.append((check.name, finding))
        if not as_json:
            fix = f" → {finding.fix}" if finding.fix else ""
            typer.echo(f"{finding.status}  {check.name:<10}  {finding.found}{fix}")
    any_failed = any(finding.status == "FAIL" for _, finding in findings)
    if as_json:
        values = [{"check": name, **asdict(finding)} for name, finding in findings]
        typer.echo(json.dumps({"ok": not any_failed, "checks": values}, indent=2, ensure_ascii=False))
    if any_failed:
        raise typer.Exit(InputError.exit_code)

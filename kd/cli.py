"""Command `hover-batch kd`: mounts the commands of `kd.commands`."""

from __future__ import annotations

import typer

from kd.commands.calibrate import calibrate
from kd.commands.evaluate import evaluate
from kd.commands.package import package
from kd.commands.prepare import prepare
from kd.commands.sweep import sweep
from kd.commands.tables import tables
from kd.commands.teach import teach
from kd.commands.train import train

kd_app = typer.Typer(
    name="kd",
    help="Train networks on annotated images, distil students from HoVerNet, and score them: prepare → teach → train → "
    "evaluate → tables.",
    no_args_is_help=True,
    suggest_commands=False,
    pretty_exceptions_enable=False,
)
for command in (prepare, teach, train, package, calibrate, sweep, evaluate, tables):
    kd_app.command()(command)

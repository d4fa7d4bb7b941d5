"""The command `hover-batch kd`, of which each part has a file in `kd.commands`."""

from __future__ import annotations

import typer

from kd.commands.evaluate import evaluate
from kd.commands.package import package
from kd.commands.tables import tables
from kd.commands.train import train

kd_app = typer.Typer(
    name="kd",
    help="Train, package and evaluate the student network.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (train, package, evaluate, tables):
    kd_app.command()(command)

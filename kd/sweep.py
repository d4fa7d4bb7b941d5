"""Many trainings, one for each point of a grid, of which each has a folder, resumes by itself and fails by itself.

A run is `kd train`, then `kd evaluate` on the test folds. It is done when its scores are there.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hover_batch.config import EngineSettings
from hover_batch.errors import HoverBatchError, InputError
from hover_batch.executor.map_tasks import TaskFailed, machines, map_tasks
from kd.commands.evaluate import evaluate
from kd.commands.train import PACKAGE, train
from kd.training.config import TrainConfig

SCORES = "scores.json"
ARGUMENTS = "arguments.json"
REPORT = "sweep.csv"
SUMMED_UP = ("pq", "aji", "dice", "f_d")
"""Scores of each source that the report shows."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is varied; nothing in an axis leaves it to the preset."""

    encoders: Sequence[str] = ()
    alphas: Sequence[float] = ()
    temperatures: Sequence[float] = ()
    seeds: Sequence[int] = ()

    def configs(self, preset: str, data: Path, out: Path, teacher: Path | None) -> Iterator[TrainConfig]:
        """The settings of each point, in order. InputError where one is faulty."""
        for encoder, alpha, temperature, seed in product(
            self.encoders or (None,), self.alphas or (None,), self.temperatures or (None,), self.seeds or (None,)
        ):
            yield TrainConfig.of(
                preset,
                data=data,
                out=out,
                teacher=teacher,
                encoder=encoder,
                alpha=alpha,
                temperature=temperature,
                seed=seed,
            )


@dataclass(frozen=True)
class Run:
    """One training. `settings`: what of it varies, for the report. `arguments`: of `kd train`, without the folder and
    the threads."""

    folder: Path
    settings: dict[str, Any]
    arguments: tuple[str, ...]
    data: Path
    test_folds: tuple[str, ...]
    threads: int

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def train_arguments(self) -> list[str]:
        return ["--out", str(self.folder), "--threads", str(self.threads), *self.arguments]

    @property
    def evaluate_arguments(self) -> list[str]:
        """Without the file."""
        folds = [word for fold in self.test_folds for word in ("--fold", fold)]
        package = str(self.folder / PACKAGE)
        return [package, "--data", str(self.data), "--label", self.name, "--threads", str(self.threads), *folds]

    @property
    def scores(self) -> dict[str, dict[str, Any]] | None:
        """By source; None where the run is not done, or was scored on other folds."""
        try:
            held = json.loads((self.folder / SCORES).read_bytes())
        except FileNotFoundError:
            return None
        sources: dict[str, dict[str, Any]] = held["sources"]
        return sources if held["folds"] == list(self.test_folds) else None


@dataclass(frozen=True)
class Ended:
    """How a run ended: with its scores by source, or for what reason not."""

    run: Run
    scores: dict[str, dict[str, Any]] | None
    reason: str = ""


def runs_of(
    grid: Grid,
    out: Path,
    *,
    data: Path,
    teacher: Path | None,
    preset: str,
    test_folds: Sequence[str],
    threads: int,
    more: Sequence[str],
) -> list[Run]:
    """The runs of a grid, in order; points that mean the same, as any T where nothing is distilled, are one run.

    `more`: further arguments of `kd train`. Raises InputError, or typer's usage error, where one is wrong or is the
    sweep's to give, and InputError where a run's folder was begun with other arguments.
    """
    data, teacher = data.resolve(), teacher and teacher.resolve()
    runs: dict[str, Run] = {}
    for config in grid.configs(preset, data, out, teacher):
        settings: dict[str, Any] = {"encoder": config.encoder, "alpha": config.alpha}
        name = f"{config.encoder}_a{config.alpha:g}"
        arguments = ["--data", str(data), "--preset", preset]
        if config.distils:
            settings["temperature"] = config.temperature
            name += f"_t{config.temperature:g}"
            arguments += ["--teacher", str(teacher)]
        settings["seed"] = config.seed
        if grid.seeds:
            name += f"_s{config.seed}"
        arguments += [word for key, value in settings.items() for word in (f"--{key}", f"{value}")]
        runs[name] = Run(out.resolve() / name, settings, (*arguments, *more), data, tuple(test_folds), threads)
    for run in runs.values():
        _check_more(run, more)
        begun = run.folder / ARGUMENTS
        if begun.exists() and tuple(json.loads(begun.read_bytes())) != run.arguments:
            raise InputError(
                f"{run.folder} was begun with other arguments (see {ARGUMENTS} in it); give another folder"
            )
    return list(runs.values())


def _check_more(run: Run, more: Sequence[str]) -> None:
    """InputError where `more` undoes what the run's name and report say of it."""
    words = run.train_arguments
    own = words[: len(words) - len(more)]  # flag, value, flag, …
    given, without = (_context(train, w).params for w in (words, own))
    for flag in own[::2]:
        if given[flag[2:]] != without[flag[2:]]:
            raise InputError(f"-- {flag}: the sweep gives it to each run; give it before the --")
    if given["model"] not in (None, "unet"):
        raise InputError(
            f"-- --model {given['model']}: a sweep is of students; train a teacher by `hover-batch kd train`"
        )


def sweep(
    runs: Sequence[Run], out: Path, *, gpus_per_run: float, engine: EngineSettings, say: Callable[[str], None]
) -> list[Ended]:
    """Do what is left of the runs, and write `out`/sweep.csv; returns how all ended. A failure costs its run only."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {out}: {error.strerror}; give a folder that can be written") from error
    left = [run for run in runs if run.scores is None]
    say(f"{len(runs)} runs, {len(runs) - len(left)} of them done before")
    reasons: dict[str, str] = {}
    if left:
        with machines(engine, out / "ray.log") as found:
            cpus = min(left[0].threads, found.cpus)
            gpus = gpus_per_run if found.gpus else 0
            at_once = max(1, min(found.cpus // cpus, int(found.gpus / gpus) if gpus else found.cpus))
            for run, result in map_tasks(work, left, backend=engine.backend, cpus=cpus, gpus=gpus, at_once=at_once):
                if isinstance(result, TaskFailed):
                    reasons[run.name] = (str(result.error).splitlines() or [type(result.error).__name__])[0]
                say(f"{run.name}: {'FAILED: ' + reasons[run.name] if run.name in reasons else 'done'}")
    ended = [Ended(run, run.scores, reasons.get(run.name, "")) for run in runs]
    _write_report(out / REPORT, ended)
    return ended


def work(run: Run) -> None:
    """One run: train, package, score. What it prints goes to train.txt in its folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    begun = run.folder / f".{ARGUMENTS}.partial"
    begun.write_text(json.dumps(run.arguments) + "\n", "utf-8")
    os.replace(begun, run.folder / ARGUMENTS)
    partial = run.folder / f".{SCORES}.partial"
    with (run.folder / "train.txt").open("a", encoding="utf-8") as printed, contextlib.redirect_stdout(printed):
        try:
            _call(train, run.train_arguments)
            _call(evaluate, [*run.evaluate_arguments, "--json", str(partial)])
        except HoverBatchError:
            raise
        except Exception:
            traceback.print_exc(file=printed)
            raise
    os.replace(partial, run.folder / SCORES)


def _call(function: Callable[..., None], arguments: list[str]) -> None:
    """Do what the command line would do, here; what it raises is raised."""
    with _context(function, arguments) as context:
        context.command.invoke(context)


def _context(function: Callable[..., None], arguments: list[str]) -> Any:
    """A command with its arguments read. A usage error where one is wrong."""
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(function)
    return typer.main.get_command(app).make_context(f"kd {function.__name__}", list(arguments))


def _write_report(path: Path, ended: Sequence[Ended]) -> None:
    rows = report(ended)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def report(ended: Sequence[Ended]) -> list[dict[str, Any]]:
    """A row for each run: its name, what varies, its scores as SOURCE_SCORE, and why it failed."""
    return [
        {
            "run": e.run.name,
            **{name: e.run.settings.get(name, "") for name in ("encoder", "alpha", "temperature", "seed")},
        }
        | {f"{source}_{name}": values[name] for source, values in (e.scores or {}).items() for name in SUMMED_UP}
        | {"failed": e.reason}
        for e in ended
    ]

"""Run sweeps: one training for each point of a grid, each in its own folder.

A run trains a student, packages it and scores it on the test folds. It is done once its scores are written; until then,
the next sweep resumes it. A failed run does not affect the others.
"""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hover_batch.config import EngineSettings, PostSettings
from hover_batch.errors import HoverBatchError, InputError
from hover_batch.executor.map_tasks import TaskFailed, map_tasks, task_resources
from hover_batch.files import read_json, to_json, write_atomically
from kd.data.datasets import contents_sha256, folds_of
from kd.evaluation.evaluate_package import evaluate_package
from kd.package import make_package, package_path
from kd.teaching.teacher_cache import TeacherCache
from kd.training.config import TrainConfig
from kd.training.logs import write_rows
from kd.training.state import CHECKPOINT
from kd.training.train import train

SCORES = "scores.json"
"""Name of the file with the scores in the folder of a run, written when the run is done."""
ARGUMENTS = "arguments.json"
"""Name of the file with the settings in the folder of a run."""
REPORT = "sweep.csv"
"""Name of the table of all runs in the folder of the sweep."""
SUMMARY_SCORES = ("pq", "aji", "dice", "f_d")
"""Scores in the report, for each source."""


@dataclass(frozen=True)
class Split:
    """Folds of one training, such as a split of PanNuke."""

    train: str
    """Fold to train on."""
    val: str
    """Fold to validate on."""
    test: str
    """Fold to score on."""

    @property
    def name(self) -> str:
        """Name of the split, TRAIN-VAL-TEST, such as 1-2-3; the names of its runs end with it."""
        return f"{self.train}-{self.val}-{self.test}"

    @property
    def settings(self) -> dict[str, tuple[str, ...]]:
        """Settings `train_folds` and `val_folds` of `TrainConfig`, each with one fold."""
        return {"train_folds": (self.train,), "val_folds": (self.val,)}

    @classmethod
    def parse(cls, text: str) -> Split:
        """Return the split in `text`, TRAIN/VAL/TEST.

        Raises InputError if `text` does not name three folds, or TRAIN and TEST are the same.
        """
        folds = text.split("/")
        if len(folds) != 3 or not all(folds):
            raise InputError(f"--split {text}: give TRAIN/VAL/TEST, such as 1/2/3")
        if folds[0] == folds[2]:
            raise InputError(f"--split {text}: TRAIN and TEST are the same fold; name another one to score on")
        return cls(*folds)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values of each axis of a sweep; on an empty axis, all runs have the preset's value."""

    encoders: Sequence[str] = ()
    """Encoders of the student."""
    alphas: Sequence[float] = ()
    """Values of α."""
    temperatures: Sequence[float] = ()
    """Values of T."""
    seeds: Sequence[int] = ()
    """Seeds of the training."""
    splits: Sequence[Split] = ()
    """Folds to train, validate and score on."""

    def points(self) -> Iterator[dict[str, Any]]:
        """Yield the settings of each point, by the names of `TrainConfig.of`; None means the preset's value.

        The key `split` is the point's split; None if the grid has no splits. The last axis, `split`, varies fastest.
        """
        axes: dict[str, Sequence[Any]] = {
            "encoder": self.encoders,
            "alpha": self.alphas,
            "temperature": self.temperatures,
            "seed": self.seeds,
            "split": self.splits,
        }
        for values in product(*(axis or (None,) for axis in axes.values())):
            yield dict(zip(axes, values, strict=True))


@dataclass(frozen=True)
class Run:
    """One training of a sweep."""

    config: TrainConfig
    """Settings of the training; `config.out` is the folder of the run."""
    label: str
    """Name without the split: the runs of all splits share a row in `kd tables`."""
    varied: dict[str, Any]
    """Settings that differ between runs, for the report."""
    test_folds: tuple[str, ...]
    """Folds that the student is scored on."""
    min_area_px: int
    """Smallest area in pixels of the predicted nuclei that are scored."""
    inputs: dict[str, str]
    """Hashes of the data and of the teacher."""

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.config.out

    @property
    def name(self) -> str:
        """Name of the run and of its folder, such as mit_b0_a0.5_t1."""
        return self.folder.name

    @property
    def arguments(self) -> dict[str, Any]:
        """Settings and hashes that identify the run, as JSON values by name.

        They are the fields of `config` without `out` and `threads`, and the hashes in `inputs`.
        """
        values = {name: value for name, value in asdict(self.config).items() if name not in ("out", "threads")}
        plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return plain | self.inputs

    @property
    def scores(self) -> dict[str, dict[str, Any]] | None:
        """Scores by source, as `SourceScores.to_json` returns them.

        None if the run is not done, was scored on other folds or with another `min_area_px`, or its file is altered.
        """
        stored = read_json(self.folder / SCORES) or {}
        as_asked = (stored.get("folds"), stored.get("min_area_px")) == (list(self.test_folds), self.min_area_px)
        sources = stored.get("sources")
        return sources if as_asked and isinstance(sources, dict) and all(map(_is_scores, sources.values())) else None


def _is_scores(scores: Any) -> bool:
    """Return whether the report can be made from these scores of a source, which may be from an altered file."""
    return isinstance(scores, dict) and all(
        name in scores and (scores[name] is None or type(scores[name]) in (int, float)) for name in SUMMARY_SCORES
    )


@dataclass(frozen=True)
class Ended:
    """Outcome of a run."""

    run: Run
    """The run."""
    scores: dict[str, dict[str, Any]] | None
    """Scores by source; None if the run failed."""
    reason: str = ""
    """First line of the error if the run failed."""


def runs_of(
    grid: Grid,
    out: Path,
    *,
    data: Path,
    teacher: Path | None,
    preset: str,
    test_folds: Sequence[str],
    min_area_px: int,
    threads: int,
    settings: Mapping[str, Any],
) -> list[Run]:
    """Return the runs of a grid in the folder `out`, in order. Nothing is written.

    Points that train the same student, such as all temperatures without distillation, are one run.

    `data`: annotated images. `teacher`: folder written by `kd teach`; None without distillation. `preset`: name of the
    preset, which gives all settings that are neither in the grid nor in `settings`. `test_folds`: folds to score on, if
    the grid has no splits. `min_area_px`: smallest area in pixels of the predicted nuclei that are scored. `threads`:
    CPU cores for each run. `settings`: further settings of all runs, by the names of `TrainConfig`.

    Raises InputError if a setting is invalid, the data or the teacher cannot be read, the data has no fold to score on,
    or a run's folder belongs to a run with other settings, data or teacher.
    """
    with_teacher = {"teacher": teacher and teacher.resolve()}
    points: dict[str, tuple[TrainConfig, str, dict[str, Any], Sequence[str]]] = {}
    for point in grid.points():
        split: Split | None = point.pop("split")
        shared = {"data": data.resolve(), "threads": threads, **settings, **(split.settings if split else {})}
        config = TrainConfig.of(preset, out=out, **shared, **with_teacher, **point)  # fills in the preset's values
        varied: dict[str, Any] = {"encoder": config.encoder, "alpha": config.alpha}
        label = f"{config.encoder}_a{config.alpha:.15g}"
        if config.distils:
            varied["temperature"] = config.temperature
            label += f"_t{config.temperature:.15g}"
        varied["seed"] = config.seed
        if grid.seeds:
            label += f"_s{config.seed}"
        name = f"{label}_{split.name}" if split else label
        run_settings = shared | varied | (with_teacher if config.distils else {})
        config = TrainConfig.of(preset, out=out.resolve() / name, **run_settings)
        points[name] = config, label, varied, [split.test] if split else test_folds
    known = folds_of(data)
    if absent := sorted({fold for *_, folds in points.values() for fold in folds} - set(known)):
        raise InputError(
            f"{'--split' if grid.splits else '--test-fold'}: {data} has no images of the fold {', '.join(absent)} to "
            f"score on; its folds are {', '.join(known)}"
        )
    inputs = hashes_of_inputs(data, teacher if any(config.distils for config, *_ in points.values()) else None)
    runs = [
        Run(config, label, varied, tuple(dict.fromkeys(folds)), min_area_px, inputs)
        for config, label, varied, folds in points.values()
    ]
    for run in runs:
        arguments = run.folder / ARGUMENTS
        if arguments.exists() and read_json(arguments) != run.arguments:
            raise InputError(
                f"{run.folder} was begun with other arguments or other data (see {ARGUMENTS} in it); give them, or "
                "another -o"
            )
    return runs


def hashes_of_inputs(data: Path, teacher: Path | None) -> dict[str, str]:
    """Return the hash of the data as `data_sha256` and, with a teacher, the hash of its package as `teacher_sha256`.

    Runs with other hashes do not count as the same run.

    `data`: annotated images. `teacher`: folder written by `kd teach`; None without distillation.

    Raises InputError if one of them cannot be read.
    """
    hashes = {"data_sha256": contents_sha256(data)}
    return hashes if teacher is None else hashes | {"teacher_sha256": TeacherCache.open(teacher).sha256}


def sweep(
    runs: Sequence[Run], out: Path, *, gpus_per_run: float, engine: EngineSettings, notify: Callable[[str], None]
) -> list[Ended]:
    """Do all runs that are not done, write `out`/sweep.csv, and return the outcome of every run, in order.

    Interrupted runs are resumed, and failed ones retried. A failed run does not stop the others. `out` is created if it
    is missing. With the backend local, the runs are done in this process, one after the other (see `do_run`).

    `gpus_per_run`: fraction of a GPU for each run, if there are GPUs. `engine`: settings of the backend. `notify`:
    called with lines of progress.

    Raises InputError if `out` cannot be created or the backend's resources are not available; HoverBatchError if Ray
    does not start; OSError if sweep.csv cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {out}: {error.strerror}; give a folder that can be written") from error
    left = [run for run in runs if run.scores is None]
    notify(f"{len(runs)} runs, {len(runs) - len(left)} of them done before")
    reasons: dict[str, str] = {}
    if left:
        with task_resources(engine, out / "ray.log") as resources:
            cpus = min(left[0].config.threads, resources.cpus)
            gpus = gpus_per_run if resources.gpus else 0
            at_once = resources.cpus // cpus
            if gpus:
                at_once = max(1, min(at_once, int(resources.gpus / gpus)))
            for run, result in map_tasks(do_run, left, backend=engine.backend, cpus=cpus, gpus=gpus, at_once=at_once):
                if isinstance(result, TaskFailed):
                    reasons[run.name] = (str(result.error).splitlines() or [type(result.error).__name__])[0]
                    notify(f"{run.name}: FAILED: {reasons[run.name]}")
                else:
                    notify(f"{run.name}: done")
    ended = [Ended(run, run.scores, reasons.get(run.name, "")) for run in runs]
    write_rows(out / REPORT, report(ended))
    return ended


def do_run(run: Run) -> None:
    """Train a student, package it and score it.

    All files are written to the folder of `run`, which is created if it is missing.

    An interrupted training is resumed. The settings are written first, to arguments.json, and the scores last, to
    scores.json. Meanwhile, the stdout of the process is appended to train.txt. The traceback of an unexpected error is
    also appended there, because the sweep reports only its first line. In this process, torch's random seed and number
    of threads are set, OpenCV is limited to one thread, and TF32 is switched off in cuDNN for a GPU.

    Errors of the training, the packaging and the scoring propagate. Raises OSError if a file cannot be written.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(run.folder / ARGUMENTS, to_json(run.arguments))
    config, package = run.config, package_path(run.config)
    with (run.folder / "train.txt").open("a", encoding="utf-8") as printed, contextlib.redirect_stdout(printed):
        try:
            train(config)
            print(make_package([run.folder / CHECKPOINT], config.data, package))
            evaluation = evaluate_package(
                str(package),
                config.data,
                folds=run.test_folds,
                post=PostSettings(min_area_px=run.min_area_px),
                label=run.label,
                threads=config.threads,
            )
            evaluation.write(run.folder / SCORES)
        except HoverBatchError:  # its message explains it
            raise
        except Exception:
            traceback.print_exc(file=printed)
            raise


def report(ended: Sequence[Ended]) -> list[dict[str, Any]]:
    """Return the rows of sweep.csv, one per run, as values by column.

    The columns are `run`, `encoder`, `alpha`, `temperature` and `seed` ("" if one does not apply), the scores, and
    `failed`, the reason if the run failed, else "". The scores of each source are SOURCE_pq, SOURCE_aji, SOURCE_dice
    and SOURCE_f_d, such as consep_pq; None if undefined. The row of a failed run has no scores.

    `ended`: outcomes of the runs, from `sweep`.
    """
    rows = []
    for outcome in ended:
        row: dict[str, Any] = {"run": outcome.run.name}
        row |= {name: outcome.run.varied.get(name, "") for name in ("encoder", "alpha", "temperature", "seed")}
        for source, scores in (outcome.scores or {}).items():
            row |= {f"{source}_{name}": scores[name] for name in SUMMARY_SCORES}
        rows.append(row | {"failed": outcome.reason})
    return rows

"""Make tables of published scores, with additional rows for our evaluations.

Evaluations with the same label (such as the folds of one setting) share a row, with their mean and standard deviation.
Each row lists its evaluations. Rows with scores on images that a model has seen in training are marked, and a note
below the table gives the reason.
"""

from __future__ import annotations

import csv
import io
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hover_batch.errors import InputError
from hover_batch.files import read_whole, write_atomically
from kd.evaluation.published_rows import (
    COST_COLUMNS,
    COST_NOTES,
    COST_ORIGIN,
    COST_ROWS,
    MIN_AREA,
    REFERENCE_MIN_AREA,
    TABLES,
    Column,
)

GENERAL = ("images", "nuclei", "dice", "aji", "dq", "sq", "pq", "bpq", "mpq", "f_d", "precision", "recall")
"""Scores of every source, in the order of the columns of our own tables."""
RUN = "run"
"""Title of the column with the origin of a row."""
NEEDED = {
    str: ("label", "sha256", "architecture", "data", "sobel_norm"),
    int: ("min_area_px",),
    list: ("folds", "leakage"),
    dict: ("sources", "by_image", "cost"),
}
"""Names of the values that the file of an evaluation must have, by type."""
MARKS = {True: "†", False: "‡"}
"""Mark of a row, by whether it is certain that images were seen."""


@dataclass(frozen=True)
class Run:
    """Evaluation read from a file."""

    path: Path
    """File that `kd evaluate --json` wrote."""
    report: Mapping[str, Any]
    """Content of the file, as from `Evaluation.to_json`."""

    @property
    def label(self) -> str:
        """Name of the row to which the evaluation belongs."""
        return str(self.report["label"])

    @property
    def sources(self) -> Mapping[str, Any]:
        """Scores by source, as `SourceScores.to_json` returns them."""
        return dict(self.report["sources"])


@dataclass(frozen=True)
class Row:
    """Row of the tables: evaluations with the same label."""

    name: str
    """Label."""
    means: dict[str, float | None]
    """Mean by column title; None if there is no value."""
    deviations: dict[str, float | None]
    """Standard deviation by column title; None for fewer than two values."""
    run: str
    """Files and model hashes of the evaluations."""
    leaks: tuple[tuple[str, str], ...] = ()
    """(mark, reason) for images that a model has seen."""


@dataclass(frozen=True)
class Table:
    """Table with published rows, then our rows."""

    name: str
    """Name of the CSV file, without its suffix."""
    title: str
    """Heading."""
    columns: Sequence[Column]
    """Columns after the model's name."""
    published: Mapping[str, Sequence[str]]
    """Cells as printed, by model."""
    origin: str
    """Reference for the published rows."""
    ours: Sequence[Row]
    """Rows of our evaluations."""
    notes: Sequence[str] = ()
    """Sentences below the table."""


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Return the evaluations in files that `kd evaluate --json` wrote, in the order of `paths`.

    Raises InputError if a file cannot be read or is not an evaluation of this version, or if two evaluations with the
    same label differ in architecture, `sobel_norm` or `min_area_px`, or are of the same model on the same images.
    """
    runs = [Run(path, _read(path)) for path in paths]
    for run in runs:
        try:
            tables([run], Path())  # reads every value that a table needs
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{run.path}: not an evaluation of this version ({type(error).__name__}: {error}); run `kd evaluate "
                "--json` again"
            ) from error
    run_of: dict[tuple[str, ...], Run] = {}
    for run in runs:
        first = next(r for r in runs if r.label == run.label)
        for key in ("architecture", "sobel_norm", "min_area_px"):
            if run.report[key] != first.report[key]:
                raise InputError(
                    f"{run.path}: its {key} is {run.report[key]}, but that of {first.path} is {first.report[key]}, "
                    f"and both have the label {run.label}; evaluate one of them with another --label"
                )
        for source in run.sources:
            scored = (
                run.label,
                source,
                run.report["sha256"],
                str(sorted(set(map(str, run.report["folds"])))),
                run.report["data"],
            )
            if duplicate := run_of.get(scored):
                raise InputError(
                    f"{run.path} and {duplicate.path}: the same model on the same images of {source}; give only one of "
                    "them"
                )
            run_of[scored] = run
    return runs


def _read(path: Path) -> Mapping[str, Any]:
    try:
        report = json.loads(read_whole(path).decode("utf-8-sig"), parse_constant=_refuse)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give files that `kd evaluate --json` wrote") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({error}); give files that `kd evaluate --json` wrote") from error
    values = report if isinstance(report, dict) else {}
    if missing := [n for kind, names in NEEDED.items() for n in names if not isinstance(values.get(n), kind)]:
        lacking = ", ".join(sorted(missing)) if values else "everything"
        raise InputError(
            f"{path}: not an evaluation of this version, it lacks {lacking}; run `kd evaluate --json` again"
        )
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def tables(runs: Sequence[Run], out: Path) -> list[Table]:
    """Return the three tables of the paper, the table of costs, and for each source a table of all its scores.

    A table of the paper has rows for the evaluations with its source and classes. The table of costs has rows for all
    evaluations, and the table of a source has rows for the evaluations with this source.

    `runs`: result of `read_runs`, which has checked the evaluations. `out`: folder to which the tables will be written;
    the files of evaluations are named relative to it.
    """
    made = []
    for paper in TABLES:
        classes = [c.name for c in paper.taxonomy.nuclei]
        fitting = [r for r in runs if paper.source in r.sources and r.sources[paper.source]["classes"] == classes]
        columns = [*paper.columns, MIN_AREA]
        published = {name: (*cells, REFERENCE_MIN_AREA) for name, cells in paper.rows.items()}
        ours = _rows(fitting, columns, _scores_on(paper.source), paper.source, out)
        notes = (*paper.notes, *_other_tests(fitting, paper.tests))
        made.append(Table(paper.name, paper.title, columns, published, paper.origin, ours, notes))
    cost = _rows(runs, COST_COLUMNS, lambda run: run.report["cost"], None, out)
    timed_on = [
        f"{r.label} was timed on {r.report['cost']['timed_on']}." for r in runs if "timed_on" in r.report["cost"]
    ]
    notes = (*COST_NOTES, *dict.fromkeys(timed_on))
    made.append(Table("cost", "Cost", COST_COLUMNS, COST_ROWS, COST_ORIGIN, cost, notes))
    for source in dict.fromkeys(s for run in runs for s in run.sources):
        scored = [run for run in runs if source in run.sources]
        columns = _all_columns([run.sources[source] for run in scored])
        rows = _rows(scored, columns, _scores_on(source), source, out)
        made.append(Table(f"ours_{source}", f"Ours: {source}", columns, {}, "", rows))
    return made


def write_tables(made: Sequence[Table], out: Path) -> None:
    """Write all tables to `out`/tables.md, and each to `out`/NAME.csv. The folder is created if it is missing.

    In file names, / and % of a source are written as %2F and %25.

    The CSV files have numbers with eight significant digits, and an additional column for each standard deviation.
    Each existing file is replaced atomically.

    `made`: result of `tables`. Raises OSError if a file cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "tables.md", "\n".join(line for table in made for line in _markdown(table)))
    for table in made:
        name = table.name.replace("%", "%25").replace("/", "%2F")  # different sources have different files
        text = io.StringIO(newline="")
        csv.writer(text).writerows(_plain(table))
        write_atomically(out / f"{name}.csv", text.getvalue())


def _scores_on(source: str) -> Callable[[Run], Mapping[str, Any]]:
    def scores(run: Run) -> Mapping[str, Any]:
        time = run.report["cost"].get("seconds_per_tile")
        return {**run.sources[source], "min_area_px": run.report["min_area_px"], "seconds_per_tile": time}

    return scores


def _all_columns(scores: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return the general columns, then the columns of all classes that occur."""
    columns = [Column(name, (name,), digits=0 if name in ("images", "nuclei") else 4) for name in GENERAL]
    for kind in ("pq_c", "f_c"):
        names = dict.fromkeys(name for s in scores for name in s[kind])
        columns += [Column(f"{kind[:-2]} {name}", (kind, name)) for name in names]
    return [*columns, MIN_AREA]


def _rows(
    runs: Sequence[Run],
    columns: Sequence[Column],
    values_of: Callable[[Run], Mapping[str, Any]],
    source: str | None,
    out: Path,
) -> list[Row]:
    """Return one row per label. `source`: the source of the scores; None if the values are not scores."""
    rows = []
    for label in dict.fromkeys(run.label for run in runs):
        group = [run for run in runs if run.label == label]
        means: dict[str, float | None] = {}
        deviations: dict[str, float | None] = {}
        for column in columns:
            found = [_at(values_of(run), column.path) for run in group]
            values = [value * column.scale for value in found if value is not None]
            means[column.title] = statistics.mean(values) if values else None
            varies = len(values) > 1 and not column.setting
            deviations[column.title] = statistics.stdev(values) if varies else None
        rows.append(Row(label, means, deviations, "; ".join(_trace(run, out) for run in group), _leaks(group, source)))
    return rows


def _at(values: Any, path: Sequence[str]) -> float | None:
    for key in path:
        values = values.get(key) if isinstance(values, Mapping) else None
    # float() would also read true and "0.7", and JSON's 1e999 is infinite.
    if values is not None and (type(values) not in (int, float) or not abs(values) <= sys.float_info.max):
        raise TypeError(f"{'.'.join(path)} is {values!r:.40}, not a finite number")
    return None if values is None else float(values)


def _trace(run: Run, out: Path) -> str:
    """Return the file of an evaluation, and the hash of its model."""
    return f"{Path(os.path.relpath(run.path, out)).as_posix()} ({run.report['sha256'][:12]})"


def _leaks(group: Sequence[Run], source: str | None) -> tuple[tuple[str, str], ...]:
    found = [
        (MARKS[leak["certain"]], leak["text"])
        for r in group
        for leak in r.report["leakage"]
        if leak["source"] == source
    ]
    return tuple(dict.fromkeys(found))


def _other_tests(runs: Sequence[Run], tests: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each row whose tests are not on the folds `tests`, of which published rows are the mean."""
    for label in dict.fromkeys(run.label for run in runs if tests):
        folds = sorted(fold for run in runs if run.label == label for fold in run.report["folds"])
        if folds != sorted(tests):
            yield (
                f"{label} is from tests on fold {', '.join(folds)}; the published rows are means over the tests of all "
                f"splits, on fold {', '.join(tests)}."
            )


def _markdown(table: Table) -> Iterator[str]:
    titles = [_plain_text(column.title) for column in table.columns]
    yield f"## {_plain_text(table.title)}\n"
    yield f"| | {' | '.join(titles)} | {RUN} |"
    yield f"|---|{'---|' * len(titles)}---|"
    for name, cells in table.published.items():
        yield f"| {name} | {' | '.join(cell or '–' for cell in cells)} | {table.origin} |"
    for row in table.ours:
        marks = "".join(sorted({mark for mark, _ in row.leaks}))
        cells = [f"{row.name} {marks}".strip(), *(_cell(row, column) for column in table.columns), row.run]
        yield f"| {' | '.join(map(_plain_text, cells))} |"
    if not table.ours:
        yield "\nNo evaluation was given for this table.\n"
    yield ""
    for row in table.ours:
        yield from (f"{mark} {_plain_text(row.name)}: {reason}\n" for mark, reason in row.leaks)
    yield from (f"{note}\n" for note in table.notes)


def _plain_text(text: str) -> str:
    """Return a label or file name as one line of Markdown, in which | does not start a new cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _cell(row: Row, column: Column) -> str:
    mean, deviation = row.means[column.title], row.deviations[column.title]
    if mean is None:
        return "–"
    shown = f"{mean:.{column.digits}f}"
    return shown if deviation is None else f"{shown} ± {deviation:.{column.digits}f}"


def _plain(table: Table) -> Iterator[list[str]]:
    titles = [column.title for column in table.columns]
    deviating = [t for t in titles if any(row.deviations[t] is not None for row in table.ours)]
    yield ["model", *titles, *(f"{title} sd" for title in deviating), RUN, "seen"]
    for name, cells in table.published.items():
        yield [name, *cells, *("" for _ in deviating), table.origin, ""]
    for row in table.ours:
        means = [row.means[title] for title in titles]
        spread = [row.deviations[title] for title in deviating]
        numbers = ["" if number is None else f"{number:.8g}" for number in (*means, *spread)]
        yield [row.name, *numbers, row.run, "; ".join(f"{mark} {reason}" for mark, reason in row.leaks)]

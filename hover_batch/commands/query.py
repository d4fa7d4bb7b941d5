"""`hover-batch query`: query a data set in SQL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hover_batch.commands.options import local_path, place
from hover_batch.commands.results import check_output, deliver, print_notes

DatasetArgument = Annotated[
    Any,
    typer.Argument(metavar="DATASET", help="Folder or URL of a data set, as given to `cohort --output`.", parser=place),
]
JoinOption = Annotated[
    Path | None,
    typer.Option(
        "--join",
        metavar="FILE",
        parser=local_path,
        help="CSV or Parquet file with one row per patient; it becomes the table `clinical`. Empty cells, NA "
        "and NaN are missing values.",
    ),
]
OnOption = Annotated[
    str,
    typer.Option(metavar="COLUMN", help="Column by which the slides and the --join file are joined."),
]
OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        parser=local_path,
        help="Write the result to a .csv or .parquet file.",
        show_default="show it on the terminal",
    ),
]


def query(
    dataset: DatasetArgument,
    sql: Annotated[str, typer.Argument(metavar="SELECT", help="Query in DuckDB's SQL.")],
    join: JoinOption = None,
    on: OnOption = "patient_id",
    output: OutputOption = None,
) -> None:
    """Query a data set in SQL.

    The tables are `nuclei` (one row per nucleus), `slides` (one row per slide and model: patient, tissue, numbers,
    flags) and, with --join, `clinical`. Join `nuclei` and `slides` by slide_id and model. A query cannot change the
    data set, and cannot read or write other files.

    Examples: show the columns of a table; count the nuclei of each class, with their mean area; write the slides with
    clinical data to a file.

    hover-batch query DATASET "DESCRIBE slides"

    hover-batch query DATASET "SELECT type, count(*), avg(area_um2) FROM nuclei GROUP BY type"

    hover-batch query DATASET "SELECT * FROM slides JOIN clinical USING (patient_id)" --join clinical.csv -o joined.csv
    """
    from hover_batch.dataset.interrupts import ended_by_ctrl_c
    from hover_batch.dataset.opened import Dataset

    check_output(output, dataset, join)
    with Dataset(dataset, join, on) as opened, ended_by_ctrl_c(opened.connection):
        print_notes(opened.notes)
        deliver(opened.select(sql), output)

"""`hover-batch view`. Heavy imports stand inside, so that `--help` answers at once."""

from __future__ import annotations

import threading
import webbrowser
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hover_batch.errors import InputError
from hover_batch.formatting import LISTED, listed

if TYPE_CHECKING:
    from hover_batch.cohort.layout import RunLayout, SlideLayout
    from hover_batch.view.server import Server

Tell = Callable[[str], None]


def view(
    run: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a run: what segment was given as --output.")],
    slide: Annotated[
        str | None, typer.Option(metavar="ID", help="The slide to look at.", show_default="the run's only one")
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of this machine to listen at.", show_default="any that is free")
    ] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Print the address, and open no browser.")] = False,
) -> None:
    """Look at one slide and its nuclei in the browser. Ctrl-C ends it, with exit code 0.

    From afar the nuclei's density is drawn, near by their outlines; one that is pointed at tells its row of the table.

    The address that is printed holds a secret and is for this machine alone.

    From another machine: ssh -L 8000:localhost:8000 HOST, and --port 8000 there.

    hover-batch view out/ --slide case-01
    """
    with serve(run, slide, port, lambda line: typer.echo(line, err=True)) as server:
        try:
            typer.echo(server.url)
            if not no_browser:
                # In a thread, since a browser in a terminal holds this call, and asks for the page meanwhile.
                threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
            server.serve_forever()
        except KeyboardInterrupt:
            return


def serve(folder: Path, slide_id: str | None, port: int, tell: Tell) -> Server:
    """A server of one slide of the run in `folder`, which listens and does not answer yet. `tell` gets what there is
    to say. InputError where the slide cannot be chosen or shown, or the port is taken; SlideError where its table is
    harmed."""
    from hover_batch.cohort.layout import RunLayout
    from hover_batch.cohort.run_folder import read_slides, require_run

    layout = RunLayout(folder)
    require_run(layout)
    records = {record.slide_id: record for record in read_slides(layout) or ()}
    slide = _chosen(layout, list(records), slide_id)
    from hover_batch.export.read import NucleiTable
    from hover_batch.view.backdrop import open_backdrop
    from hover_batch.view.nuclei import NucleiTiles
    from hover_batch.view.server import Server, Site

    server = Server(port)  # before what takes time: the port may be taken
    try:
        tell(f"{slide.slide_id}: opening")
        table = NucleiTable.open(slide.nuclei_parquet)
        backdrop = open_backdrop(slide, records[slide.slide_id], table)
        if backdrop.missing:
            tell(f"{slide.slide_id}: shown on its thumbnail, since {backdrop.missing}")
        server.site = Site(backdrop, NucleiTiles(table))
    except BaseException:
        server.server_close()
        raise
    tell(f"{slide.slide_id}: {table.rows:,} nuclei. Ctrl-C ends this.")
    return server


def _chosen(layout: RunLayout, slide_ids: Sequence[str], wanted: str | None) -> SlideLayout:
    """Return the slide `wanted`, or the run's only one. InputError where it is not done or not one of the run's."""
    from hover_batch.cohort.run_folder import nuclei_if_done

    if wanted is None and len(slide_ids) == 1:
        wanted = slide_ids[0]
    known = wanted is not None and wanted in slide_ids
    if known and nuclei_if_done(slide := layout.slide(str(wanted))) is not None:
        return slide
    # A few are listed, so not all of a large cohort are looked at.
    done = list(islice((n for n in slide_ids if nuclei_if_done(layout.slide(n)) is not None), LISTED + 1))
    can = f"done are: {listed(done)}" if done else "none of the run's is done yet"
    if known:
        raise InputError(f"--slide {wanted}: is not done; see failures.csv, or give segment's command again; {can}")
    if wanted is not None:
        raise InputError(f"--slide {wanted}: is no slide of this run; {can}")
    raise InputError(f"--slide ID must say which of the run's {len(slide_ids):,} slides to look at; {can}")

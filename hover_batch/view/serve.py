"""Open a slide of a run for its server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hover_batch.cohort.layout import RunLayout, SlideLayout
from hover_batch.cohort.run_folder import nuclei_if_done, read_slides, require_run, slide_if_done
from hover_batch.errors import InputError
from hover_batch.formatting import LISTED, listed

if TYPE_CHECKING:
    from hover_batch.view.server import Server

Tell = Callable[[str], None]


def serve(folder: Path, slide_id: str | None, port: int, tell: Tell) -> Server:
    """Return a server of one slide of the run in `folder`, which listens and does not answer yet. `tell` gets messages.

    InputError where the slide cannot be chosen or shown, or the port is taken; SlideError where its table is corrupted.
    """
    layout = RunLayout(folder)
    require_run(layout)
    records = {record.slide_id: record for record in read_slides(layout) or ()}
    slide = _chosen(layout, list(records), slide_id)
    # After the quick checks, since these imports take seconds.
    from hover_batch.export.read import NucleiTable
    from hover_batch.quality.flags import flag_slides
    from hover_batch.view.backdrop import open_backdrop
    from hover_batch.view.nuclei import NucleiTiles
    from hover_batch.view.server import Server, Site

    server = Server(port)  # before the slow work: the port may be taken
    try:
        tell(f"{slide.slide_id}: opening")
        table = NucleiTable.open(slide.nuclei_parquet)
        backdrop = open_backdrop(slide, records[slide.slide_id], table)
        if backdrop.missing:
            tell(f"{slide.slide_id}: shown on its thumbnail, since {backdrop.missing}")
        # Flags compare the slide with the others of the run.
        done = {name: held for name in records if (held := slide_if_done(layout.slide(name)))}
        server.site = Site(backdrop, NucleiTiles(table), flag_slides(done)[slide.slide_id])
    except BaseException:
        server.server_close()
        raise
    tell(f"{slide.slide_id}: {table.rows:,} nuclei. Ctrl-C ends this.")
    return server


def _chosen(layout: RunLayout, slide_ids: Sequence[str], wanted: str | None) -> SlideLayout:
    """Return the slide `wanted`, or the run's only one. InputError where it is not done or not one of the run's."""
    if wanted is None and len(slide_ids) == 1:
        wanted = slide_ids[0]
    known = wanted is not None and wanted in slide_ids
    if known and nuclei_if_done(slide := layout.slide(str(wanted))) is not None:
        return slide
    # A few are listed, so not all of a large cohort are looked at.
    done = list(islice((n for n in slide_ids if nuclei_if_done(layout.slide(n)) is not None), LISTED + 1))
    can = f"done are: {listed(done)}" if done else "none of the run's is done yet"
    if known:
        raise InputError(f"--slide {wanted}: is not done; see failures.csv, or run segment's command again; {can}")
    if wanted is not None:
        raise InputError(f"--slide {wanted}: is no slide of this run; {can}")
    raise InputError(f"--slide ID must say which of the run's {len(slide_ids):,} slides to look at; {can}")

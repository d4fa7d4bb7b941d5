"""Open a slide of a run in a server for the viewer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from hover_batch.cohort.layout import RunLayout, SlideLayout
from hover_batch.cohort.record import Url
from hover_batch.cohort.run_folder import nuclei_if_done, read_slides, require_run, slide_if_done, why_not_done
from hover_batch.dataset.layout import DatasetLayout
from hover_batch.dataset.slides import read_entries
from hover_batch.errors import InputError
from hover_batch.formatting import LISTED, listed

if TYPE_CHECKING:
    from hover_batch.view.server import Server

Notify = Callable[[str], None]


def serve(folder: Path | Url, slide_id: str | None, port: int, notify: Notify) -> Server:
    """Return a server for one slide of a run. The caller closes it with `server_close` or a `with` block.

    It listens on this machine only (127.0.0.1), and answers once its `serve_forever` is called. If the slide cannot be
    opened, its thumbnail is shown instead.

    `folder`: folder of a run, or folder or URL of a data set; in this case, the run that the slide comes from must be
    on this machine. `slide_id`: slide to show; None for the only slide. `port`: port to listen on; 0 for any free port.
    `notify`: function that is called with lines about progress.

    InputError if the folder holds no run, the port cannot be used, `slide_id` is None but there are several slides, the
    slide is not in the run, is not done or cannot be shown, or the run of a data set's slide is ambiguous or no longer
    at its place; SlideError if its table is corrupted; OSError if a file of the run or data set cannot be read;
    UploadError if a data set in a bucket cannot be read.
    """
    if isinstance(folder, Url) or DatasetLayout(folder).slides_parquet.is_file():
        folder = _run_of(folder, slide_id)
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
        notify(f"{slide.slide_id}: opening …")
        table = NucleiTable.open(slide.nuclei_parquet)
        backdrop = open_backdrop(slide, records[slide.slide_id], table)
        if backdrop.missing:
            notify(f"{slide.slide_id}: the slide cannot be opened, its thumbnail is shown instead: {backdrop.missing}")
        # Flags compare the slide with the others of the run.
        slides_done = {name: stored for name in records if (stored := slide_if_done(layout.slide(name)))}
        server.site = Site(backdrop, NucleiTiles(table), flag_slides(slides_done)[slide.slide_id])
    except BaseException:
        server.server_close()
        raise
    notify(f"{slide.slide_id}: {table.rows:,} nuclei. Press Ctrl-C to stop.")
    return server


def _chosen(layout: RunLayout, slide_ids: Sequence[str], wanted: str | None) -> SlideLayout:
    """Return the slide `wanted`, or the run's only one. InputError if it is not done or not in the run."""
    if wanted is None and len(slide_ids) == 1:
        wanted = slide_ids[0]
    known = wanted is not None and wanted in slide_ids
    if known and nuclei_if_done(slide := layout.slide(str(wanted))) is not None:
        return slide
    # Only a few are listed, so that not every slide of a large cohort is checked.
    done = list(islice((n for n in slide_ids if nuclei_if_done(layout.slide(n)) is not None), LISTED + 1))
    can = f"done slides: {listed(done)}" if done else "no slide of the run is done yet"
    if known:
        raise InputError(f"--slide {wanted}: {why_not_done(layout.slide(str(wanted)))}; {can}")
    if wanted is not None:
        raise InputError(f"--slide {wanted}: is not a slide of this run; {can}")
    raise InputError(f"the run has {len(slide_ids):,} slides; choose one with --slide ID; {can}")


def _run_of(dataset: Path | Url, slide_id: str | None) -> Path:
    """Return the folder of the run that a slide of a data set comes from, which has the slide's path and pictures.

    InputError if the slide is not in the data set, is from several runs, or its run was moved.
    """
    entries = read_entries(dataset)
    runs = dict.fromkeys(entry.run for entry in entries if slide_id in (None, entry.slide_id))
    slide_ids = list(dict.fromkeys(entry.slide_id for entry in entries))
    if slide_id is not None and not runs:
        raise InputError(f"--slide {slide_id}: is not a slide of this data set; its slides: {listed(slide_ids)}")
    if slide_id is None and len(slide_ids) != 1:
        raise InputError(f"the data set has {len(slide_ids):,} slides; choose one with --slide ID: {listed(slide_ids)}")
    if len(runs) > 1:
        raise InputError(
            f"{slide_ids[0] if slide_id is None else slide_id}: is from several runs; name one of them "
            f"instead of the data set: {listed(runs)}"
        )
    [run] = runs
    if not Path(run).is_dir():
        raise InputError(f"{run}: the run of this slide is not there any more; name the folder that it was moved to")
    return Path(run)

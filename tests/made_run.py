"""Write the folders of runs as `segment` leaves them, from annotated nuclei: quick, and without a network."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
from annotated import nuclei_from, take
from numpy.typing import NDArray

from hover_batch import __version__
from hover_batch.cohort.events import EventLog
from hover_batch.cohort.layout import RunLayout, SlideLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.cohort.run_folder import RUN_FORMAT
from hover_batch.export.pictures import View, write_overlay, write_thumbnail
from hover_batch.export.summary import slide_summary
from hover_batch.files import sha256_file
from hover_batch.geometry import Grid, Mpp
from hover_batch.nuclei.table import TableContext, merge_parts, to_arrow, write_part
from hover_batch.slide.headers import peek
from hover_batch.slide.survey import write_survey
from hover_batch.slide.tissue import TissueMask
from hover_batch.taxonomy import CONSEP

MPP = Mpp(0.25, 0.25)


def write_field(folder: Path, side: int = 400) -> tuple[Path, NDArray[np.int32], NDArray[np.uint8]]:
    """A picture of dark ellipses on pink, its instance map and its type map, of which class 1 has none."""
    random = np.random.default_rng(3)
    image = np.full((side, side, 3), (200, 160, 225), np.uint8)
    instances = np.zeros((side, side), np.int32)
    for label, (x, y) in enumerate(np.argwhere(np.ones((side // 25, side // 25))) * 25 + 12, start=1):
        axes = [int(v) for v in random.integers(5, 11, 2)]
        angle = float(random.uniform(0, 180))
        at = (int(x), int(y))
        cv2.ellipse(instances, at, axes, angle, 0, 360, label, -1)
        cv2.ellipse(image, at, axes, angle, 0, 360, (120, 60, 90), -1)
    path = folder / "field.png"
    cv2.imwrite(str(path), image)
    return path, instances, np.where(instances > 0, instances % 3 + 2, 0).astype(np.uint8)


def write_run(
    out: Path,
    image: Path,
    instances: NDArray[np.integer],
    types: NDArray[np.uint8],
    done: Sequence[str] = (),
    failed: Sequence[tuple[str, str]] = (),
    pending: Sequence[str] = (),
    group: str = "a",
) -> RunLayout:
    """A run of the picture `image` at 0.25 µm a pixel, under the slide_ids `done`, each with a random share of the
    annotated nuclei; of `failed` rows with their reasons, which may be no ids; and of slides `pending`, not begun."""
    layout = RunLayout(out)
    layout.slides.mkdir(parents=True)
    run = {"format": RUN_FORMAT, "model_id": "starter", "model_sha256": "0", "command": ["segment", "cohort.csv"]}
    layout.run_json.write_text(json.dumps(run))
    layout.versions_json.write_text(json.dumps({"hover-batch": __version__}))
    layout.settings_toml.write_text('model = "starter"\n')
    log = EventLog(layout.events_jsonl)
    log.append("run_started", slides=len(done) + len(failed) + len(pending))
    for row, (slide_id, reason) in enumerate(failed, start=2 + len(done) + len(pending)):
        log.append("slide_failed", slide_id=slide_id, row=row, path=f"{slide_id}.svs", stage="open", reason=reason)
    nuclei = nuclei_from(instances, types, len(CONSEP.classes))
    for number, slide_id in enumerate(done):
        kept = np.random.default_rng(number).random(len(nuclei.type_id)) < (number % 10 + 1) / 10
        _write_slide(layout, slide_id, image, take(nuclei, kept), draw=number < 4)
    if not pending:
        log.append("run_finished", done=len(done), failed=len(failed), model_busy=0.5)
    log.close()
    with layout.slides_csv.open("w", newline="") as file:
        writer = csv.writer(file)
        names = (
            "path",
            "slide_id",
            "mpp",
            "magnification",
            "mask_path",
            "patient_id",
            "group",
            "site",
            "row",
            "status",
        )
        writer.writerow(names)
        for row, slide_id in enumerate([*done, *pending], start=2):
            writer.writerow([image, slide_id, MPP.x, "", "", f"P{row // 2}", group, "north", row, "pending"])
    return layout


def _write_slide(layout: RunLayout, slide_id: str, image: Path, nuclei: SimpleNamespace, draw: bool) -> None:
    slide = layout.slide(slide_id)
    slide.folder.mkdir()
    slide.key_json.write_text("{}")
    record = SlideRecord(slide_id=slide_id, path=image, row=2, mpp=MPP)
    info = peek(record)
    grid = Grid(info.level0, 1.0, 1.0, MPP, info.level0)
    context = TableContext(slide_id, CONSEP, grid, MPP, "cohort", None, "starter", "0", __version__)
    part = slide.folder / "part.parquet"
    write_part(part, to_arrow(nuclei, context))
    merged = merge_parts([(0, part)], slide.nuclei_parquet, context)
    part.unlink()
    tissue = np.ones((8, 8), bool)
    tissue[:, :2] = False
    mask = TissueMask(tissue, (info.level0.width / 8, info.level0.height / 8))
    write_survey(slide.survey_json, info, mask)
    if draw:
        pixels = np.asarray(cv2.imread(str(image))[:, :, ::-1], np.uint8)
        view = View(pixels, 0, 0, 1, 1)
        write_thumbnail(slide.thumbnail_jpg, view, [])
        write_overlay(slide.overlay_jpg, view, slide.nuclei_parquet, CONSEP)
    summary: dict[str, Any] = slide_summary(
        record,
        CONSEP,
        status="done",
        nuclei=slide.nuclei_parquet,
        tissue_mm2=mask.area_mm2(MPP),
        seconds={"infer": 3.0, "post": 1.0},
    )
    done = {"slide_id": slide_id, "nuclei": merged.nuclei, "summary": summary, "warnings": []}
    slide.slide_json.write_text(json.dumps(done))
    record_table(slide)


def record_table(slide: SlideLayout) -> None:
    """Record the table of nuclei in slide.json, as if the run had written it."""
    done = json.loads(slide.slide_json.read_bytes()) | {"nuclei_sha256": sha256_file(slide.nuclei_parquet)}
    slide.slide_json.write_text(json.dumps(done))

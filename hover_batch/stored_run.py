"""A run whose predictions were kept, as the source of new tables: its settings, its model's card, its slides.

All of it is read from the run's folder, and nothing is written there: neither slides nor weights need to be at hand.
"""

from __future__ import annotations

import csv
import io
import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.ledger import RUN_FORMAT
from hover_batch.cohort.manifest import COLUMNS, RUN_COLUMNS, Cohort
from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.config import Settings
from hover_batch.errors import InputError, PackageError, SlideError
from hover_batch.geometry import Grid, Mpp
from hover_batch.model.package import Card, Package
from hover_batch.plan import Kept, Plan, PlannedSlide
from hover_batch.slide.survey import read_info

_LISTED = 10


@dataclass(frozen=True)
class KeptRun:
    """The run at `layout`. `settings`: those that gave its tables, the rest defaults. `package`: its model's card and
    hash, without weights. `plan`: its slides; those without usable predictions are `unreadable`."""

    layout: RunLayout
    settings: Settings
    package: Package
    plan: Plan

    @classmethod
    def open(cls, folder: Path) -> Self:
        """InputError where the folder is no run's, or none of its slides can be used."""
        layout = RunLayout(folder)
        run = read_json(layout.run_json)
        if run is None or run.get("format") != RUN_FORMAT:
            raise InputError(f"--from {folder}: is no folder of a run; name what segment was given as --output")
        try:
            held = tomllib.loads(layout.settings_toml.read_text(encoding="utf-8"))
            settings = Settings.from_dict({k: held[k] for k in ("model", "tissue", "infer", "post") if k in held})
            records = read_records(layout.slides_csv)
        except (OSError, LookupError, ValueError, InputError) as error:
            raise InputError(f"--from {folder}: its settings.toml or slides.csv cannot be read ({error})") from error
        slides: list[PlannedSlide] = []
        unusable: list[tuple[SlideRecord, str]] = []
        card: Card | None = None
        for record in records:
            try:
                slide, card = _planned(layout, record, str(run.get("model_sha256")))
                slides.append(slide)
            except (SlideError, PackageError) as error:
                unusable.append((record, str(error)))
        if card is None:
            lines = [f"  {record.slide_id}: {reason}" for record, reason in unusable[:_LISTED]]
            raise InputError("\n".join([f"--from {folder}: none of its slides can be used", *lines]))
        return cls(
            layout,
            settings,
            Package(layout.root, card, str(run["model_sha256"])),
            Plan(Cohort(str(layout.root), records, (), ()), tuple(slides), tuple(unusable)),
        )

    def check(self, settings: Settings, output: Path, *, force: bool) -> None:
        """InputError where `settings` ask for other predictions, or `output` is not for new tables of this run."""
        wanted = {"model": settings.model, "tissue": asdict(settings.tissue), "infer": asdict(settings.infer)}
        for section, value in wanted.items():
            held = getattr(self.settings, section)
            pairs = [(section, held, value)]
            if isinstance(value, dict):
                pairs = [(f"{section}.{name}", getattr(held, name), new) for name, new in value.items()]
            for name, old, new in pairs:
                if old != new:
                    raise InputError(
                        f"--from {self.layout.root}: was predicted with {name} = {old}, not {new}; leave that flag, "
                        "variable or setting out, or run the slides themselves"
                    )
        here, there = output.resolve(), self.layout.root.resolve()
        if here == there or there in here.parents:
            raise InputError(f"--output {output}: lies in the run that --from names, which is only read; name another")
        held_run = read_json(RunLayout(output).run_json)
        if held_run is not None and held_run.get("cohort") != str(self.layout.root) and not force:
            raise InputError(
                f"--output {output}: holds a run of {held_run.get('cohort')}, not new tables of {self.layout.root}; "
                "name a new folder, or --force to remove the results there"
            )


def _planned(layout: RunLayout, record: SlideRecord, model_sha256: str) -> tuple[PlannedSlide, Card]:
    """One slide and the card of the model that predicted it. SlideError where its predictions cannot be used."""
    slide = layout.slide(record.slide_id)
    done = read_json(slide.slide_json)
    if done is None or "run_key" not in done:
        raise SlideError(
            f"is not done in {layout.root}; see failures.csv there, or finish it by that run's own command"
        )
    store = read_json(slide.predictions_zarr / "zarr.json")
    if store is None:
        raise SlideError(
            f"{slide.predictions_zarr}: is not there or harmed; stores are kept by runs without --discard-predictions, "
            "and not made by --from"
        )
    attributes = store.get("attributes", {})
    if attributes.get("model_sha256") != model_sha256 or "model" not in attributes:
        raise SlideError(f"{slide.predictions_zarr}: is not of the model in {layout.run_json}; run the slide anew")
    if not slide.survey_json.is_file():
        raise SlideError(
            f"{slide.survey_json} is not there: an older version of hover-batch made that run; run the slide anew"
        )
    card, info = Card.from_json(attributes["model"]), read_info(slide.survey_json)
    grid = Grid.over(info.level0, info.mpp, card.mpp)
    tiles = sum(1 for _ in grid.size.box.cells(card.tile_out))
    return PlannedSlide(record, info, grid, tiles, Kept(slide, done["run_key"])), card


def read_records(slides_csv: Path) -> tuple[SlideRecord, ...]:
    """The slides of a run, as its slides.csv has them."""
    rows = csv.DictReader(io.StringIO(slides_csv.read_bytes().decode(), newline=""))
    return tuple(
        SlideRecord(
            slide_id=row["slide_id"],
            path=Url.of(row["path"]) or Path(row["path"]),
            row=int(row["row"]),
            mpp=Mpp(float(row["mpp"]), float(row["mpp"])) if row["mpp"] else None,
            magnification=float(row["magnification"]) if row["magnification"] else None,
            mask_path=Path(row["mask_path"]) if row["mask_path"] else None,
            patient_id=row["patient_id"] or None,
            group=row["group"] or None,
            extra={name: value for name, value in row.items() if name not in (*COLUMNS, *RUN_COLUMNS)},
        )
        for row in rows
    )


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none, or none that can be read."""
    try:
        held = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None

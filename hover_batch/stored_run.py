"""Open a finished run as the source of new tables: its settings, its model's card and its slides.

Only the run's folder is read, and nothing is written there. Neither slides nor weights are needed.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.manifest import Cohort
from hover_batch.cohort.record import SlideRecord
from hover_batch.cohort.run_folder import read_run, read_slides, require_run, slide_if_done, why_not_done
from hover_batch.cohort.run_lock import is_locked
from hover_batch.config import Settings
from hover_batch.errors import InputError, PackageError, SlideError
from hover_batch.files import read_json
from hover_batch.formatting import LISTED, listed
from hover_batch.geometry import Grid
from hover_batch.model.card import Card
from hover_batch.model.package import Package
from hover_batch.plan import Plan, PlannedSlide, StoredMaps
from hover_batch.slide.survey import read_info
from hover_batch.store import HV_MASKED


@dataclass(frozen=True)
class StoredRun:
    """Finished run whose predictions are the source of new tables."""

    layout: RunLayout
    """Paths of the run's results."""
    settings: Settings
    """Settings that the run's tables depend on; all others have their defaults."""
    package: Package
    """Card and hash of the model, without weights."""
    plan: Plan
    """Slides of the run; those without usable predictions are in `plan.unreadable`."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open the run in `folder` as a source of new tables.

        Slides that cannot be used are listed in `plan.unreadable` of the result.

        InputError if the folder holds no run, the run is still active, its files are corrupted or cannot be read, or no
        slide can be used.
        """
        layout = RunLayout(folder)
        if is_locked(layout.lock):
            raise InputError(f"--from {folder}: a run is still writing to it; wait until it ends")
        try:
            run = require_run(layout, "--from")
            stored = tomllib.loads(layout.settings_toml.read_text(encoding="utf-8"))
            settings = Settings.from_dict({k: stored[k] for k in ("model", "tissue", "infer", "post") if k in stored})
            records = read_slides(layout) or ()
        except (OSError, ValueError) as error:
            raise InputError(f"--from {folder}: its settings.toml or slides.csv cannot be read ({error})") from error
        slides: list[PlannedSlide] = []
        unusable: list[tuple[SlideRecord, str]] = []
        card: Card | None = None  # the same for all slides, since they have the run's model
        for record in records:
            try:
                slide, card = _planned(layout, record, str(run.get("model_sha256")))
                slides.append(slide)
            except (OSError, SlideError, PackageError) as error:
                unusable.append((record, str(error)))
        if card is None:
            lines = [f"  {record.slide_id}: {reason}" for record, reason in unusable[:LISTED]]
            raise InputError("\n".join([f"--from {folder}: none of its slides can be used", *lines]))
        return cls(
            layout,
            settings,
            Package(layout.root, card, str(run["model_sha256"])),
            Plan(Cohort(str(layout.root), records, (), ()), tuple(slides), tuple(unusable)),
        )

    def check(self, settings: Settings, output: Path, *, force: bool) -> None:
        """Check that new tables with `settings` can be made from this run and written to `output`. Nothing is removed.

        `settings`: settings of the new tables. `output`: folder for them; it need not exist. `force`: whether results
        in `output` will be removed before the run.

        InputError if the settings require predictions that this run did not store, if `output` is this run's folder or
        a folder in it, if `output` holds a corrupted run, or if it holds a run that was not made from this run and
        `force` is not set. OSError if the run.json there cannot be read.
        """
        wanted = _prediction_settings(settings)
        for name, stored in _prediction_settings(self.settings).items():
            if stored != wanted[name]:
                raise InputError(
                    f"--from {self.layout.root}: was predicted with {name} = {stored}, not {wanted[name]}; leave this "
                    "option, variable or setting out, or run segment on the slides themselves"
                )
        masked = [slide.record.slide_id for slide in self.plan.slides if slide.stored and slide.stored.hv_masked]
        if settings.post.sobel_norm == "window" and masked:
            raise InputError(
                f"--sobel-norm window: needs h and v of the background, which {self.layout.root} did not store "
                f"({listed(masked)}); run segment with this option on the slides themselves"
            )
        target, source = output.resolve(), self.layout.root.resolve()
        if target == source or source in target.parents:
            raise InputError(
                f"--output {output}: is in the folder of --from, which must not change; name another folder"
            )
        previous = read_run(RunLayout(output), "--output")
        if previous is not None and previous.get("cohort") != str(self.layout.root) and not force:
            raise InputError(
                f"--output {output}: holds a run of {previous.get('cohort')}, not new tables of {self.layout.root}; "
                "name a new folder, or give --force to remove the results there"
            )


def _prediction_settings(settings: Settings) -> dict[str, Any]:
    """Return the settings that determine the predictions, by their full names, such as infer.batch."""
    named: dict[str, Any] = {"model": settings.model}
    for section in ("tissue", "infer"):
        values = asdict(getattr(settings, section))
        named |= {f"{section}.{name}": value for name, value in values.items()}
    return named


def _planned(layout: RunLayout, record: SlideRecord, model_sha256: str) -> tuple[PlannedSlide, Card]:
    """Return one slide and the card of the model that predicted it.

    SlideError or PackageError if its predictions cannot be used.
    """
    slide = layout.slide(record.slide_id)
    done = slide_if_done(slide)
    if done is None or "run_key" not in done:
        raise SlideError(why_not_done(slide))
    store = read_json(slide.predictions_zarr / "zarr.json")
    if store is None:
        raise SlideError(
            f"{slide.predictions_zarr}: is missing or corrupted; only runs without --discard-predictions and without "
            "--from keep their predictions"
        )
    attributes = store.get("attributes", {})
    if attributes.get("model_sha256") != model_sha256 or "model" not in attributes:
        raise SlideError(
            f"{slide.predictions_zarr}: was not predicted by the model in {layout.run_json}; run the slide again"
        )
    if not slide.survey_json.is_file():
        raise SlideError(
            f"{slide.survey_json}: is missing, since an older version of hover-batch made the run; run the slide again"
        )
    card, info = Card.from_json(attributes["model"]), read_info(slide.survey_json)
    grid = Grid.over(info.level0, info.mpp, card.mpp)
    tiles = sum(1 for _ in grid.size.box.cells(card.tile_out))
    maps = StoredMaps(slide, done["run_key"], bool(attributes.get(HV_MASKED)))
    return PlannedSlide(record, info, grid, tiles, maps), card

"""Slides and masks whose files change between the plan and their turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.ledger import Ledger
from hover_batch.cohort.manifest import read_cohort
from hover_batch.config import Settings
from hover_batch.errors import SlideError
from hover_batch.model.package import find_package
from hover_batch.plan import plan_cohort
from hover_batch.slide.staging import Copies
from hover_batch.slide_work import opened, result_key, survey


def test_a_slide_that_was_replaced_after_the_plan_is_not_run_under_the_old_key(tmp_path: Path) -> None:
    (tmp_path / "cohort.csv").write_text("path,mpp\nfield.png,0.25\n")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "field.png")
    (slide,) = plan_cohort(read_cohort(str(tmp_path / "cohort.csv")), find_package("starter").card).slides
    copies = Copies.of_run(tmp_path / "out", "")
    with opened(slide, copies) as reader:
        assert reader is not None
    Image.fromarray(pixels[:, :48]).save(tmp_path / "field.png")
    with pytest.raises(SlideError, match="replaced or changed after the run began"), opened(slide, copies):
        pass


def test_a_mask_that_was_replaced_after_the_plan_is_not_used_under_the_old_key(tmp_path: Path) -> None:
    (tmp_path / "cohort.csv").write_text("path,mpp,mask_path\nfield.png,0.25,mask.png\n")
    Image.new("RGB", (96, 64), (200, 100, 180)).save(tmp_path / "field.png")
    pixels = np.zeros((64, 96), np.uint8)
    pixels[:32] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    package, settings = find_package("starter"), Settings()
    (slide,) = plan_cohort(read_cohort(str(tmp_path / "cohort.csv")), package.card).slides
    layout = Ledger(RunLayout(tmp_path / "out")).open_slide("field", result_key(slide, package, settings))
    with opened(slide, Copies.of_run(tmp_path / "out", "")) as reader:
        assert survey(reader, slide, package, settings, layout).info.warnings == ()
        before = layout.survey_json.read_bytes()
        Image.fromarray(pixels[::-1]).save(tmp_path / "mask.png")
        with pytest.raises(SlideError, match=r"mask\.png: the mask was replaced or changed after the run began"):
            survey(reader, slide, package, settings, layout)
    assert layout.survey_json.read_bytes() == before


def test_warnings_of_a_mask_are_stored_with_its_slide(tmp_path: Path) -> None:
    (tmp_path / "cohort.csv").write_text("path,mpp,mask_path\nfield.png,0.25,mask.png\n")
    Image.new("RGB", (96, 64), (200, 100, 180)).save(tmp_path / "field.png")
    Image.new("L", (96, 64), 255).save(tmp_path / "mask.png")
    package, settings = find_package("starter"), Settings()
    (slide,) = plan_cohort(read_cohort(str(tmp_path / "cohort.csv")), package.card).slides
    layout = Ledger(RunLayout(tmp_path / "out")).open_slide("field", result_key(slide, package, settings))
    with opened(slide, Copies.of_run(tmp_path / "out", "")) as reader:
        (warning,) = survey(reader, slide, package, settings, layout).info.warnings
    assert "covers the whole slide" in warning

"""The check of pixel sizes on dense images that trained nothing, with the true pixel size and wrong ones."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from hover_batch.cohort.record import SlideRecord
from hover_batch.config import InferSettings, TissueSettings
from hover_batch.geometry import Mpp
from hover_batch.model.package import find_package
from hover_batch.model.predict import load_predictor
from hover_batch.quality.scale_check import check_scale

MPP = 0.25
SOURCES = ("consep", "tnbc", "gbm40", "monuseg", "lgg_tcga")
LEAST_NUCLEI, LEAST_SIDE = 100, 500
FACTORS = (0.5, 1, 2)
"""Given pixel size divided by the true one."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_true_pixel_sizes_are_confirmed(data: Path) -> None:
    with (data / "nuclei" / "dataset.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] in ("val", "test") and row["source"] in SOURCES]
    dense = [row for row in rows if int(row["n_nuclei"]) >= LEAST_NUCLEI]
    images = [row for row in dense if min(int(row["width"]), int(row["height"])) >= LEAST_SIDE]
    predictor = load_predictor(find_package("starter"), InferSettings(device="cpu"))
    found: dict[float, Counter[str]] = {}
    for factor in FACTORS:
        given, verdicts = Mpp(MPP * factor, MPP * factor), Counter[str]()
        for number, row in enumerate(images):
            record = SlideRecord(row["sample_id"], data / "nuclei" / row["image"], mpp=given, row=number + 1)
            said = check_scale(record, predictor, TissueSettings(tissue="all"))
            confirmed = said.startswith("the nuclei fit")
            right = confirmed if factor == 1 else f"fit {MPP} µm better" in said
            verdicts["right" if right else "confirmed" if confirmed else "other"] += 1
        found[factor] = verdicts
        print(f"given {given} µm, true {MPP}: {dict(verdicts)} of {len(images)}")
    record = SlideRecord("tenfold", data / "nuclei" / images[0]["image"], mpp=Mpp(2.5, 2.5), row=2)
    assert f"fit {MPP} µm better than the given 2.5" in check_scale(record, predictor, TissueSettings(tissue="all"))
    assert found[1]["right"] >= 0.9 * len(images)
    assert found[2]["right"] >= 0.5 * len(images) and found[0.5]["right"] >= 0.5 * len(images)

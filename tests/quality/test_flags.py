"""Flags follow from measures, limits and the cohort, and from nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from hover_batch.quality.flags import FLAG_NAMES, RULES, counts_of, flag_slides, summary_columns

GOOD: dict[str, Any] = {
    "summary": {
        "nuclei": 4000,
        "tissue_mm2": 1.0,
        "nuclei_per_mm2": 4000.0,
        "area_um2_p50": 30.0,
        "solidity_p50": 0.94,
    },
    "quality": {
        "h_od": 0.4,
        "e_od": 0.1,
        "seg_score": 0.9,
        "type_prob": 0.85,
        "sharpness": [2.0, 2.2, 1.9],
        "ink": 0.0,
        "brown": 0.0,
        "chroma": 70.0,
        "dark": 0.5,
    },
}
NO_NUCLEI = {"h_od": None, "e_od": None, "seg_score": None, "type_prob": None, "sharpness": []}


def slide(summary: dict[str, Any] | None = None, **quality: Any) -> dict[str, Any]:
    """slide.json of a good slide with other values; None removes one."""
    changed = {"summary": GOOD["summary"] | (summary or {}), "quality": GOOD["quality"] | quality}
    return {part: {k: v for k, v in values.items() if v is not None} for part, values in changed.items()}


def names(value: dict[str, Any], others: list[dict[str, Any]] | None = None) -> list[str]:
    cohort = {"it": value, **{str(i): other for i, other in enumerate(others or [])}}
    return [flag.name for flag in flag_slides(cohort)["it"]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (slide(), []),
        (
            slide({"nuclei": 0, "tissue_mm2": 0.0, "nuclei_per_mm2": None, "area_um2_p50": None}, **NO_NUCLEI),
            ["no_tissue"],
        ),
        (slide({"nuclei": 0, "nuclei_per_mm2": 0.0, "area_um2_p50": None}, **NO_NUCLEI), ["no_nuclei"]),
        (slide({"nuclei": 24, "nuclei_per_mm2": 24.0, "area_um2_p50": 7.0}), ["few_nuclei", "pixel_size"]),
        (slide(mask_on_tissue=0.6), []),
        (slide(mask_on_tissue=0.2), ["mask"]),
        (slide({"nuclei_per_mm2": 50_000.0}), ["many_nuclei"]),
        (slide({"area_um2_p50": 140.0}), ["pixel_size"]),
        (slide({"area_um2_p50": 140.0, "nuclei": 19}), []),
        (slide({"area_um2_p50": 140.0, "nuclei": 20}), ["pixel_size"]),
        (slide({"solidity_p50": 0.92}), []),
        (slide({"solidity_p50": 0.89}), ["pixel_size"]),
        (slide(sharpness=[0.6, 2.0, 2.0, 2.0]), []),
        (slide(sharpness=[0.6, 0.5, 2.0, 2.0]), ["out_of_focus"]),
        (slide(ink=0.02), ["ink"]),
        (slide(chroma=3.0), ["grey"]),
        (slide(chroma=3.0, dark=0.0), []),
        (slide(brown=0.4), ["ihc"]),
        (slide(h_od=0.05), ["stain"]),
        (slide(e_od=0.8), ["stain"]),
        (slide(seg_score=0.5), ["low_seg_score"]),
        (slide(type_prob=0.3), ["low_type_prob"]),
    ],
)
def test_limits_hold_without_a_cohort(value: dict[str, Any], expected: list[str]) -> None:
    assert names(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (slide({"nuclei_per_mm2": 900.0}), ["few_nuclei"]),
        (slide({"nuclei_per_mm2": 16_000.0}), ["many_nuclei"]),
        (slide({"area_um2_p50": 15.0}), ["pixel_size"]),
        (slide(sharpness=[0.9, 0.9, 2.0]), ["out_of_focus"]),
        (slide(seg_score=0.7), ["low_seg_score"]),
        (slide(type_prob=0.7), ["low_type_prob"]),
    ],
)
def test_a_slide_is_compared_with_seven_others_and_more(value: dict[str, Any], expected: list[str]) -> None:
    others = [slide({"nuclei_per_mm2": 4000.0 * (1 + 0.05 * i)}) for i in range(-3, 4)]
    assert names(value, others) == expected
    assert names(value, others[:-1]) == []
    # Serial sections are alike; small differences are not outliers.
    assert names(slide({"nuclei_per_mm2": 3000.0, "area_um2_p50": 27.0}), [GOOD] * 20) == []


def test_one_outlier_does_not_hide_another() -> None:
    others = [slide({"nuclei_per_mm2": 4000.0 + 100 * i}) for i in range(10)]
    wild = [slide({"nuclei_per_mm2": 1e6})] * 3
    assert names(slide({"nuclei_per_mm2": 500.0}), others + wild) == ["few_nuclei"]


@pytest.mark.parametrize(("area", "factor"), [(7.5, "2 times"), (120.0, "0.5 times"), (520.0, "0.25 times")])
def test_the_factor_of_the_pixel_size_is_given(area: float, factor: str) -> None:
    [flag] = flag_slides({"a": slide({"area_um2_p50": area})})["a"]
    assert flag.name == "pixel_size" and factor in flag.sentence


def test_irregular_outlines_flag_the_pixel_size_without_a_factor() -> None:
    [flag] = flag_slides({"a": slide({"solidity_p50": 0.89})})["a"]
    assert "solidity 0.89" in flag.sentence and "groups" in flag.sentence and "would fit" not in flag.sentence


def test_limits_of_the_card_take_precedence() -> None:
    assert names({**slide(h_od=1.6), "limits": {"h_od": [0.5, 2.0]}}) == []
    assert names({**slide(), "limits": {"h_od": [0.5, 2.0]}}) == ["stain"]


def test_the_card_can_only_narrow_the_limits_of_the_area() -> None:
    assert names({**slide({"area_um2_p50": 9.5}), "limits": {"area_um2": [4.9, 66.7]}}) == ["pixel_size"]
    assert names({**slide({"area_um2_p50": 70.0}), "limits": {"area_um2": [4.9, 66.7]}}) == ["pixel_size"]
    assert names({**slide({"area_um2_p50": 13.8}), "limits": {"area_um2": [4.9, 66.7]}}) == []


def test_what_was_not_measured_gives_no_flag() -> None:
    old = {"summary": {"nuclei": 0, "tissue_mm2": 1.0, "nuclei_per_mm2": 0.0}}
    assert names(old) == ["no_nuclei"]
    assert names({"nuclei": 3}) == []
    assert summary_columns({}, ())["ink"] is None


def test_the_table_is_complete_and_its_sentences_are_filled() -> None:
    assert tuple(rule.name for rule in RULES) == FLAG_NAMES
    bad = slide(
        {"nuclei": 50, "nuclei_per_mm2": 5.0, "area_um2_p50": 5.0}, sharpness=[0.1], ink=0.5, brown=0.5, h_od=2.0
    )
    flags = flag_slides({"bad": bad, "good": slide()})
    assert flags["good"] == ()
    assert counts_of(flags) == dict.fromkeys(["few_nuclei", "pixel_size", "out_of_focus", "ink", "ihc", "stain"], 1)
    for flag in flags["bad"]:
        assert "{" not in flag.sentence and ("Look at" in flag.sentence or "Check" in flag.sentence)
    assert summary_columns(bad, flags["bad"])["flags"] == "few_nuclei;pixel_size;out_of_focus;ink;ihc;stain"
    assert summary_columns(bad, flags["bad"])["out_of_focus"] == 1.0

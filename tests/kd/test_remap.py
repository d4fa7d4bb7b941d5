"""Common classes: the paper's for CoNSeP, on real types, and an error if none are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from truth_maps import maps_of_truth

from hover_batch.errors import InputError
from hover_batch.model.heads import MapLayout
from hover_batch.taxonomy import CONSEP, MONUSAC, NUCLEI, PANNUKE, Taxonomy
from kd.data.datasets import Data, Sample, read_data
from kd.evaluation.evaluate import evaluate_data
from kd.evaluation.remap import PAPER_CONSEP, remap_of, remaps_of
from kd.training.validate import TYPICAL


def names(taxonomy: Taxonomy, ids: tuple[int, ...], common: Taxonomy) -> dict[str, str]:
    return {c.name: common.classes[i].name for c, i in zip(taxonomy.classes, ids, strict=True)}


def test_the_papers_classes_for_consep() -> None:
    remap = remap_of(PANNUKE, PANNUKE, "consep")
    assert [c.name for c in remap.taxonomy.nuclei] == ["neoplastic", "inflammatory", "epithelial", "miscellaneous"]
    assert names(PANNUKE, remap.model, remap.taxonomy) == {
        "background": "background",
        "neoplastic": "neoplastic",
        "inflammatory": "inflammatory",
        "connective": "miscellaneous",
        "dead": "miscellaneous",
        "epithelial": "epithelial",
    }
    assert remap.data == remap.model


def test_other_data_of_equal_classes_stays_as_it_is() -> None:
    for taxonomy in (PANNUKE, CONSEP, MONUSAC):
        remap = remap_of(taxonomy, replace(taxonomy, name="another name"), "pannuke")
        assert [c.name for c in remap.taxonomy.nuclei] == [c.name for c in taxonomy.nuclei]
        assert remap.data == remap.model == tuple(range(len(taxonomy.classes)))


@pytest.mark.parametrize(("data_of", "model_of"), [(CONSEP, PANNUKE), (PANNUKE, CONSEP)])
def test_merged_consep_leaves_three_classes(data_of: Taxonomy, model_of: Taxonomy) -> None:
    remap = remap_of(data_of, model_of, "consep")
    common = remap.taxonomy
    consep, pannuke = (remap.data, remap.model) if data_of is CONSEP else (remap.model, remap.data)
    assert [c.name for c in common.nuclei] == ["epithelial", "inflammatory", "miscellaneous"]
    assert names(CONSEP, consep, common) == {
        **{name: name for name in ("background", "epithelial", "inflammatory", "miscellaneous")},
        "spindle": "miscellaneous",
    }
    assert names(PANNUKE, pannuke, common) == {
        **{name: name for name in ("background", "epithelial", "inflammatory")},
        "neoplastic": "epithelial",
        "connective": "miscellaneous",
        "dead": "miscellaneous",
    }


def test_where_one_side_has_no_types_only_nuclei_are_common() -> None:
    for remap in (
        remap_of(NUCLEI, PANNUKE, "kumar"),
        remap_of(PANNUKE, NUCLEI, "pannuke"),
        remap_of(CONSEP, MONUSAC, "tnbc", typed=False),
    ):
        assert remap.taxonomy is NUCLEI
        assert set(remap.data[1:]) == set(remap.model[1:]) == {1}


def test_unknown_pairs_are_refused_with_both_listed() -> None:
    with pytest.raises(
        InputError, match=r"source lizard: its classes are neoplastic, .*, the model's epithelial, lymph"
    ):
        remap_of(PANNUKE, MONUSAC, "lizard")


def small(source: str, types: np.ndarray | None) -> Sample:
    instances = np.array([[0, 1, 1, 2, 2, 3]], np.int32)
    return Sample("x", source, "", np.zeros((1, 6, 3), np.uint8), instances, types)


def test_what_pannuke_has_no_class_for_is_miscellaneous_in_consep_alone() -> None:
    types = np.array([[0, 0, 0, 5, 5, 3]], np.uint8)
    got = remap_of(PANNUKE, PANNUKE, "consep").sample(small("consep", types)).types
    ids = {c.name: c.id for c in PAPER_CONSEP.classes}
    assert got is not None
    assert got.tolist() == [[0, *[ids["miscellaneous"]] * 2, *[ids["epithelial"]] * 2, ids["miscellaneous"]]]
    kept = remap_of(PANNUKE, PANNUKE, "lizard").sample(small("lizard", types)).types
    assert kept is not None and (kept == types).all()


def test_sources_have_their_own_classes() -> None:
    typed = np.zeros((1, 6), np.uint8)
    data = Data(PANNUKE, [small("tnbc", None), small("consep", typed), small("pannuke", typed), small("pannuke", None)])
    found = {source: remap.taxonomy.name for source, remap in remaps_of(data, PANNUKE).items()}
    assert found == {"tnbc": NUCLEI.name, "consep": PAPER_CONSEP.name, "pannuke": PANNUKE.name}


def test_a_pannuke_model_that_knows_scores_on_merged_consep_as_one_of_its_own(data: Path) -> None:
    """Epithelial nuclei are to it neoplastic and epithelial by halves: together they are the class."""
    sample = read_data(data / "nuclei", ["val"], ["consep"]).samples[2]
    part = slice(500, 750), slice(750, 1000)
    crop = {name: np.ascontiguousarray(getattr(sample, name)[part]) for name in ("image", "instances", "types")}
    sample = replace(sample, **crop)
    as_pannuke = np.array([0, 4, 2, 5, 3], np.uint8)[sample.types]
    maps = maps_of_truth(sample.instances, as_pannuke, len(PANNUKE.classes))
    tp = MapLayout(len(PANNUKE.classes)).tp
    maps[tp.start + 1] = maps[tp.start + 5] // 2 + 1
    maps[tp.start + 5] //= 2
    real = Data(CONSEP, [sample])
    (scores,) = evaluate_data(lambda image: maps, real, TYPICAL, PANNUKE)
    assert scores.classes == ("epithelial", "inflammatory", "miscellaneous")
    assert scores.type_accuracy == 1 and scores.nuclei > 50
    native = maps_of_truth(sample.instances, sample.types, len(CONSEP.classes))
    (same,) = evaluate_data(lambda image: native, real, TYPICAL, CONSEP)
    assert (scores.pq, scores.f_d) == (same.pq, same.f_d) and scores.pq > 0.8
    for name, as_is in (("epithelial", "epithelial"), ("inflammatory", "inflammatory"), ("miscellaneous", "spindle")):
        assert (scores.pq_c[name], scores.f_c[name]) == (same.pq_c[as_is], same.f_c[as_is])
    (untyped,) = evaluate_data(lambda image: native[[0, 1, 2, 3, 5, -2, -1]], real, TYPICAL, NUCLEI)
    assert (untyped.pq, untyped.f_d, untyped.f_c) == (scores.pq, scores.f_d, {})

"""Matching: the same pairs as all pairs of contours give, whatever the batches, and in both directions."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import pytest
import shapely
from annotated import nuclei_from
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hover_batch.diff.match import MIN_IOU, match_tables
from hover_batch.export import read
from hover_batch.export.read import NucleiTable
from hover_batch.geometry import Grid, Mpp, Size
from hover_batch.nuclei.table import TableContext, merge_parts, to_arrow, write_part
from hover_batch.taxonomy import CONSEP

SIDE = 160


def field(seed: int, jitter: int) -> NDArray[np.int32]:
    """Instance map of ellipses around the same centres for every seed, moved by up to `jitter` pixels."""
    centres = np.random.default_rng(0).integers(0, SIDE, (60, 2))
    random = np.random.default_rng(seed)
    instances = np.zeros((SIDE, SIDE), np.int32)
    for label, centre in enumerate(centres, start=1):
        at = centre + random.integers(-jitter, jitter + 1, 2)
        axes = (5 + random.integers(0, jitter + 1, 2)).tolist()
        if random.random() < 0.9:
            cv2.ellipse(instances, at.tolist(), axes, float(random.integers(180)), 0, 360, label, -1)
    # One nucleus from the top to the bottom spans all batches.
    instances[:, 80:84] = 100
    return instances


def table(folder: Path, name: str, instances: NDArray[np.int32]) -> NucleiTable:
    size, mpp = Size(SIDE, SIDE), Mpp(0.25, 0.25)
    context = TableContext("s", CONSEP, Grid(size, 1.0, 1.0, mpp, size), mpp, "cohort", None, "m", "0", "1")
    write_part(folder / "part", to_arrow(nuclei_from(instances, None, 5), context))  # type: ignore[arg-type]
    merge_parts([(0, folder / "part")], folder / f"{name}.parquet", context)
    return NucleiTable.open(folder / f"{name}.parquet")


def polygons(of: NucleiTable) -> NDArray[np.object_]:
    return np.concatenate([of.polygons(batch) for batch in of.batches()])


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 4), st.integers(1, 70))
def test_matches_are_those_of_all_pairs(seed: int, other: int, jitter: int, batch: int) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "BATCH", batch)
        a, b = (table(Path(folder), n, field(s, jitter)) for n, s in (("a", seed), ("b", other)))
        matches, mirrored = match_tables(a, b), match_tables(b, a)
        of_a, of_b = polygons(a), polygons(b)
    shared = shapely.area(shapely.intersection(of_a[:, None], of_b[None]))
    iou = shared / (shapely.area(of_a)[:, None] + shapely.area(of_b)[None] - shared)
    assert (iou[tuple(matches.pairs.T)] > MIN_IOU).all()
    assert matches.iou == pytest.approx(iou[tuple(matches.pairs.T)])
    for side in range(2):
        assert len(np.unique(matches.pairs[:, side])) == len(matches.pairs)
    best = (iou > MIN_IOU) & (iou == iou.max(axis=1, keepdims=True)) & (iou == iou.max(axis=0, keepdims=True))
    assert {*map(tuple, np.argwhere(best).tolist())} == {*map(tuple, matches.pairs.tolist())}
    assert {*map(tuple, matches.pairs.tolist())} == {*map(tuple, mirrored.pairs[:, ::-1].tolist())}
    only_a, only_b = matches.unmatched()
    assert len(only_a) == len(of_a) - len(matches.pairs) and len(only_b) == len(of_b) - len(matches.pairs)


def test_tables_without_nuclei(tmp_path: Path) -> None:
    empty, full = table(tmp_path, "a", np.zeros((SIDE, SIDE), np.int32)), table(tmp_path, "b", field(1, 1))
    for first, second in ((empty, full), (full, empty), (empty, empty)):
        matches = match_tables(first, second)
        assert len(matches.pairs) == 0 and (len(matches.first), len(matches.second)) == (first.rows, second.rows)

"""Image, instances and types get the same geometry: ids are painted into the image and read back."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from kd.data.appearance import jitter_color, jitter_stain, lose_resolution, random_appearance
from kd.data.datasets import Sample, read_data
from kd.training.augment import LABEL_MARGIN, random_geometry, random_view, turn_hv
from kd.training.targets import hv_targets


def painted(instances) -> Sample:
    """Red and green hold the instance's id, blue its type."""
    types = np.where(instances > 0, instances % 4 + 1, 0).astype(np.uint8)
    image = np.stack([instances & 255, instances >> 8, types * 40], axis=2).astype(np.uint8)
    return Sample("painted", "consep", "", image, instances.astype(np.int32), types)


@pytest.fixture(scope="module")
def sample(data: Path) -> Sample:
    labels = cv2.imread(str(data / "nuclei" / "labels" / "consep_train_14.png"), cv2.IMREAD_UNCHANGED)
    return painted(labels)


@pytest.mark.parametrize("seed", range(12))
def test_labels_follow_the_image(sample, seed):
    image, instances, types, _ = random_geometry(sample, 224, np.random.default_rng(seed))
    wide = 224 + 2 * LABEL_MARGIN
    assert (image.shape, instances.shape, types.shape) == ((224, 224, 3), (wide, wide), (wide, wide))
    assert (image.dtype, instances.dtype, types.dtype) == (np.uint8, np.int32, np.uint8)
    assert (types == np.where(instances > 0, instances % 4 + 1, 0)).all()
    inner = instances[LABEL_MARGIN:-LABEL_MARGIN, LABEL_MARGIN:-LABEL_MARGIN]
    # Where all pixels around belong to one nucleus, interpolation cannot mix colours: the id reads back exactly.
    wide_map, around = instances.astype(np.float32), np.ones((5, 5), np.uint8)
    plain = cv2.erode(wide_map, around) == cv2.dilate(wide_map, around)
    plain = plain[LABEL_MARGIN:-LABEL_MARGIN, LABEL_MARGIN:-LABEL_MARGIN]
    seen = image[..., 0].astype(int) + 256 * image[..., 1].astype(int)
    assert (plain & (inner > 0)).sum() > 1000
    assert (seen[plain] == inner[plain]).all()


def test_geometry_covers_turns_flips_and_scales():
    """A marked corner: over many draws all eight orientations come, and lengths within the range of scales."""
    instances = np.zeros((400, 400), np.int32)
    instances[180:220, 180:220] = 1
    instances[180:190, 180:190] = 2
    instances[180:190, 190:220] = 3
    seen, areas = set(), []
    for seed in range(120):
        _, view, *_ = random_geometry(painted(instances), 256, np.random.default_rng(seed))
        if (view > 0).sum() == 0 or view[0].any() or view[-1].any() or view[:, 0].any() or view[:, -1].any():
            continue
        corner, edge, body = (np.argwhere(view == i).mean(axis=0) for i in (2, 3, 1))
        areas.append((view > 0).sum() / 1600)
        (cy, cx), (ey, ex) = corner - body, edge - body
        handed = cy * ex - cx * ey > 0
        seen.add((bool(handed), int(np.floor(np.arctan2(cy, cx) / (np.pi / 2)))))
    assert len(seen) == 8
    assert 0.8**2 * 0.95 < min(areas) < 0.75
    assert 1.4 < max(areas) < 1.25**2 * 1.05


@pytest.mark.parametrize("kind", ["full", "turns", "none"])
def test_a_view_as_large_as_its_image_lies_inside_it(kind):
    for seed in range(20):
        _, instances, *_ = random_geometry(
            painted(np.ones((100, 130), np.int32)), 100, np.random.default_rng(seed), kind
        )
        assert (instances[LABEL_MARGIN:-LABEL_MARGIN, LABEL_MARGIN:-LABEL_MARGIN] == 1).all()


def test_a_view_depends_on_its_generator_alone(sample):
    first, again = (random_view(sample, 128, np.random.default_rng((7, 3))) for _ in range(2))
    other = random_view(sample, 128, np.random.default_rng((7, 4)))
    assert all((a == b).all() for a, b in zip(first[:3], again[:3], strict=True))
    assert not (first[0] == other[0]).all()


@pytest.fixture(scope="module")
def tissue(data: Path):
    """A real H&E crop."""
    return read_data(data / "nuclei", ["test"], ["tnbc"]).samples[0].image[:256, :256]


@pytest.mark.parametrize("change", [random_appearance, jitter_stain, jitter_color])
def test_appearance_moves_nothing(tissue, change):
    """The changed picture still lies on the original: its grey values match best where they are."""
    grey = cv2.cvtColor(tissue, cv2.COLOR_RGB2GRAY).astype(np.float32)
    for seed in range(6):
        changed = change(tissue, np.random.default_rng(seed))
        assert changed.shape == tissue.shape and changed.dtype == np.uint8
        other = cv2.cvtColor(changed, cv2.COLOR_RGB2GRAY).astype(np.float32)
        match = cv2.matchTemplate(grey, other[16:-16, 16:-16], cv2.TM_CCOEFF_NORMED)
        assert np.unravel_index(match.argmax(), match.shape) == (16, 16)
        assert match.max() > 0.7


def test_losing_resolution_moves_nothing(tissue):
    grey = cv2.cvtColor(tissue, cv2.COLOR_RGB2GRAY).astype(np.float32)
    for seed in range(6):
        other = cv2.cvtColor(lose_resolution(tissue, np.random.default_rng(seed)), cv2.COLOR_RGB2GRAY)
        match = cv2.matchTemplate(grey, other[16:-16, 16:-16].astype(np.float32), cv2.TM_CCOEFF_NORMED)
        assert np.unravel_index(match.argmax(), match.shape) == (16, 16)


def test_stain_jitter_keeps_white_white():
    white = np.full((8, 8, 3), 255, np.uint8)
    for seed in range(20):
        assert jitter_stain(white, np.random.default_rng(seed)).min() > 215


def with_teacher(instances) -> tuple[Sample, np.ndarray]:
    """A teacher that knows the truth: np, h and v, and the id in place of a type."""
    sample = painted(instances)
    nuclei = instances > 0
    planes = np.stack([~nuclei, nuclei, *hv_targets(instances.astype(np.int32)), instances]).astype(np.float16)
    return sample, planes


def without_ties(instances: np.ndarray) -> np.ndarray:
    """Only nuclei whose centroid is no half integer: those are rounded up, which is down once they are flipped."""
    kept = instances.copy()
    for i in np.unique(instances)[1:]:
        where = np.argwhere(instances == i)
        if len(where) > 2000 or ((2 * where.sum(0)) % (2 * len(where)) == len(where)).any():
            kept[instances == i] = 0
    return kept


@pytest.mark.parametrize("kind", ["turns", "color"])
def test_a_teachers_planes_are_those_of_the_turned_nuclei(data: Path, kind):
    """h and v of turned and flipped nuclei are, to the bit, the teacher's h and v turned and flipped."""
    labels = cv2.imread(str(data / "nuclei" / "labels" / "consep_train_14.png"), cv2.IMREAD_UNCHANGED)[:300, :340]
    sample, planes = with_teacher(without_ties(labels.astype(np.int32)))
    seen = set()
    for seed in range(20):
        view = random_geometry(sample, 96, np.random.default_rng(seed), kind, planes)
        inner = slice(LABEL_MARGIN, -LABEL_MARGIN)
        assert (view.planes[4] == view.instances[inner, inner]).all()
        assert (view.planes[1] == (view.instances[inner, inner] > 0)).all()
        assert (view.image[..., 0] == (view.instances[inner, inner] & 255)).all()  # pixels fall on pixels
        # A nucleus that the wide labels cut has other extents; the others must agree.
        wide = view.instances
        cut = np.unique(np.concatenate([wide[0], wide[-1], wide[:, 0], wide[:, -1]]))
        whole = ~np.isin(wide, cut)[inner, inner] & (wide[inner, inner] > 0)
        truth = hv_targets(wide)[:, inner, inner].astype(np.float16)
        assert whole.sum() > 100
        assert (view.planes[2:4][:, whole] == truth[:, whole]).all()
        seen.add(view.planes[2:4].tobytes())
    assert len(seen) > 1


def test_all_eight_turns_and_flips_of_h_and_v():
    # Odd extents, so that no centroid lies between pixels; no symmetry, so that the eight differ.
    instances = np.zeros((21, 21), np.int32)
    instances[5:16, 5:10] = 1
    instances[11:16, 5:16] = 1
    instances[2:5, 14:19] = 2
    instances = without_ties(instances)
    assert set(np.unique(instances)) == {0, 1, 2}
    hv = hv_targets(instances)
    y, x = np.mgrid[:21, :21] - 10
    for turn in range(4):
        for flip in (1, -1):
            cos, sin = (round(f(turn * np.pi / 2)) for f in (np.cos, np.sin))
            step = np.array([[cos, -sin * flip], [sin, cos * flip]], float)
            xs, ys = (np.rint(step[i, 0] * x + step[i, 1] * y).astype(int) + 10 for i in range(2))
            assert np.array_equal(turn_hv(hv[:, ys, xs], step), hv_targets(instances[ys, xs]))


def test_with_a_teacher_a_full_view_is_scaled_and_turned_by_right_angles_alone(data: Path):
    labels = cv2.imread(str(data / "nuclei" / "labels" / "consep_train_14.png"), cv2.IMREAD_UNCHANGED)[:300, :340]
    sample, planes = with_teacher(labels.astype(np.int32))
    inner = slice(LABEL_MARGIN, -LABEL_MARGIN)
    for seed in range(8):
        view = random_geometry(sample, 96, np.random.default_rng(seed), "full", planes)
        ids = view.instances[inner, inner]
        assert (view.planes[4] == ids).mean() > 0.999
        truth = hv_targets(view.instances)[:, inner, inner]
        cut = np.unique(np.concatenate([view.instances[0], view.instances[-1], *view.instances[:, [0, -1]].T]))
        whole = ~np.isin(ids, cut) & (ids > 0)
        # Scaling leaves h and v as they are, but for the rounding of pixels and centroids.
        assert np.abs(view.planes[2:4] - truth)[:, whole].mean() < 0.06


@pytest.mark.parametrize("kind", ["full", "turns", "color", "none"])
def test_a_view_as_large_as_the_image_stays_inside(kind):
    sample = painted(np.ones((128, 128), np.int32))
    for seed in range(8):
        _, instances, *_ = random_geometry(sample, 128, np.random.default_rng(seed), kind)
        inner = instances[LABEL_MARGIN:-LABEL_MARGIN, LABEL_MARGIN:-LABEL_MARGIN]
        assert (inner == 1).all()


def test_the_smaller_kinds_keep_place_and_scale(sample, tissue):
    tissue_sample = Sample("t", "tnbc", "", tissue, np.zeros((256, 256), np.int32), None)
    for seed in range(4):
        plain = random_view(tissue_sample, 128, np.random.default_rng(seed), "none").image
        match = cv2.matchTemplate(tissue, plain, cv2.TM_SQDIFF)
        y, x = np.unravel_index(match.argmin(), match.shape)
        assert (tissue[y : y + 128, x : x + 128] == plain).all()
        view = random_view(tissue_sample, 128, np.random.default_rng(seed), "color").image
        match = cv2.matchTemplate(*(cv2.cvtColor(a, cv2.COLOR_RGB2GRAY) for a in (tissue, view)), cv2.TM_CCOEFF_NORMED)
        assert np.unravel_index(match.argmax(), match.shape) == (y, x)

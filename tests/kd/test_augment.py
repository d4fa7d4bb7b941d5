"""Image, instances and types go through the same geometry: the ids are painted into the image and read back."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from kd.augment import (
    LABEL_MARGIN,
    jitter_color,
    jitter_stain,
    lose_resolution,
    random_appearance,
    random_geometry,
    random_view,
)
from kd.datasets import Sample, read_instance_folder


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
    image, instances, types = random_geometry(sample, 224, np.random.default_rng(seed))
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
        _, view, _ = random_geometry(painted(instances), 256, np.random.default_rng(seed))
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


def test_an_image_smaller_than_the_view_is_mirrored_and_unlabelled_beyond_its_edge():
    sample = painted(np.ones((100, 100), np.int32))
    image, instances, _ = random_geometry(sample, 192, np.random.default_rng(0))
    assert (image[..., 0] == 1).all()
    assert (instances == 0).any() and (instances == 1).any()


def test_a_view_depends_on_its_generator_alone(sample):
    first, again = (random_view(sample, 128, np.random.default_rng((7, 3))) for _ in range(2))
    other = random_view(sample, 128, np.random.default_rng((7, 4)))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not (first[0] == other[0]).all()


@pytest.fixture(scope="module")
def tissue(data: Path):
    """A real H&E crop."""
    return read_instance_folder(data / "nuclei", "test", ["tnbc"])[0].image[:256, :256]


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

"""Averaging over rotations and flips: an output that turns with its image equals its own mean."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from hover_batch.model.heads import HV, NP, Heads
from kd.teaching.tta import VIEWS, averaged, turned, turned_back
from kd.training.targets import hv_targets

HEADS = Heads(3)


def painted() -> np.ndarray:
    """Ids of nuclei in the first channel: rectangles of odd sides, so that centroids are whole pixels in every view."""
    image = np.zeros((40, 56, 3), np.uint8)
    for i, (y, x, height, width) in enumerate(
        [(2, 3, 7, 13), (12, 20, 5, 3), (25, 5, 11, 9), (20, 40, 15, 5)], start=1
    ):
        image[y : y + height, x : x + width] = i
    return image


def knows(images):
    """The truth of a painted image, whichever way it lies."""
    outputs = []
    for image in images:
        ids = image[..., 0].astype(np.int32)
        planes = [ids == 0, ids > 0, *hv_targets(ids), ids == 0, ids % 2 == 1, (ids > 0) & (ids % 2 == 0)]
        outputs.append(np.stack([p.astype(np.float32) for p in planes]))
    return outputs


@pytest.mark.parametrize(("turns", "flip"), VIEWS)
def test_the_output_of_a_view_becomes_that_of_the_image(turns, flip):
    image = painted()
    (output,) = knows([np.ascontiguousarray(turned(image, turns, flip))])
    assert np.array_equal(turned_back(output, turns, flip), knows([image])[0])


def test_the_views_are_eight():
    image = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    assert len({(v := turned(image, *view)).shape + (v.tobytes(),) for view in VIEWS}) == 8


def test_what_turns_with_its_image_is_its_own_mean():
    image = painted()
    expected = knows([image])[0]
    for output in averaged(knows, [image, image], 3):
        assert output.dtype == np.float32
        assert np.allclose(output[HV], expected[HV], atol=1e-6)
        for branch in (NP, HEADS.tp):
            assert np.allclose(softmax(output[branch], axis=0), softmax(expected[branch], axis=0), atol=1e-6)


def test_the_mean_is_of_probabilities():
    """Of a network that looks at the place alone: the mean over the eight places that a pixel takes."""
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(HEADS.channels, 8, 8)).astype(np.float32)
    (output,) = averaged(lambda images: [plane.copy() for _ in images], [np.zeros((8, 8, 3), np.uint8)], 3)
    views = [turned_back(plane, *view) for view in VIEWS]
    assert np.allclose(output[HV], np.mean([v[HV] for v in views], axis=0), atol=1e-6)
    for branch in (NP, HEADS.tp):
        expected = np.mean([softmax(v[branch], axis=0) for v in views], axis=0)
        assert np.allclose(np.exp(output[branch]), expected, atol=1e-6)

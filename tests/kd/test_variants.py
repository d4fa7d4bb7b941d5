"""Post-processing with variable parameters: HoVerNet's give the same as on slides; and the cost of storing bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.maps import synthetic_maps
from hover_batch.metrics import mean_defined, panoptic_quality
from hover_batch.model.heads import HV, NP, MapLayout
from hover_batch.model.package import find_package, load_network
from hover_batch.model.predict import quantise
from hover_batch.nuclei.watershed import SobelConstants, instance_map
from kd.data.datasets import read_data
from kd.evaluation.variants import Maps, Parameters, extremes, from_stored, instances_by


def test_with_the_references_numbers_they_are_the_steps_of_the_kernels() -> None:
    maps, layout = synthetic_maps(384)
    planes = np.ascontiguousarray(maps[[layout.NP, layout.H, layout.V]])
    constants = SobelConstants.of_window(planes[1], planes[2])
    floats = from_stored(planes)
    np.testing.assert_allclose(
        list(extremes(floats, Parameters().sobel).to_json().values()), list(constants.to_json().values()), rtol=1e-5
    )
    found = panoptic_quality(instance_map(*planes, None), instances_by(floats, constants, Parameters()))
    assert found.pq > 0.999, found


@pytest.mark.parametrize(
    "other", [Parameters(nucleus=0.6), Parameters(marker=0.3), Parameters(sobel=11), Parameters(opening=0)]
)
def test_each_number_matters(other: Parameters) -> None:
    maps, _ = synthetic_maps(256)
    floats = from_stored(maps[:3])
    usual, changed = (instances_by(floats, extremes(floats, n.sobel), n) for n in (Parameters(), other))
    assert panoptic_quality(usual, changed).pq < 0.9999


def as_stored_and_as_computed(image: NDArray[np.uint8]) -> tuple[Maps, Maps]:
    """The starter's maps of one image (y, x, 3) with sides in multiples of 32."""
    network = load_network(find_package("starter"))
    rgb = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
    with torch.inference_mode():
        output = network(rgb.float() / 255)
    stored = quantise(output, rgb, MapLayout(output.shape[1] - 4))[0].numpy()
    h, v = output[0, HV].clamp(-1, 1).numpy()
    return from_stored(stored[:3]), (output[:, NP].softmax(1)[0, 1].numpy(), h, v)


def stored_against_computed(images: list[NDArray[np.uint8]]) -> float:
    """Mean PQ over the images of the instances from bytes against those from floats, by the starter's constants."""
    constants = SobelConstants.from_json(find_package("starter").card.sobel)
    pairs = [[instances_by(maps, constants, Parameters()) for maps in as_stored_and_as_computed(i)] for i in images]
    assert sum(computed.max() for _, computed in pairs) > 30 * len(images)
    return mean_defined(panoptic_quality(computed, stored).pq for stored, computed in pairs)


def test_maps_as_bytes_give_the_nuclei_of_floats(data: Path) -> None:
    samples = read_data(data / "nuclei", ["val"], ["monuseg"]).samples[:2]
    assert stored_against_computed([s.image[:320, :320] for s in samples]) >= 0.9995


@pytest.mark.slow
def test_maps_as_bytes_give_the_nuclei_of_floats_on_every_tile(data: Path) -> None:
    for source in ("consep", "monuseg", "tnbc"):
        images = [s.image for s in read_data(data / "nuclei", ["val", "test"], [source]).samples]
        pq = stored_against_computed([i[: i.shape[0] // 32 * 32, : i.shape[1] // 32 * 32] for i in images])
        print(f"{source}: PQ of stored against computed maps {pq:.6f} over {len(images)} images", file=sys.stderr)
        assert pq >= 0.9995

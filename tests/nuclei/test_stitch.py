"""The nuclei of any tiling equal those of the whole slide in all columns."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from synthetic_maps import LAYOUT, Canvas, maps_of, random_canvas

from hover_batch.config import PostSettings
from hover_batch.geometry import Box
from hover_batch.nuclei import stitch
from hover_batch.nuclei.measure import Nuclei, concatenate, measure
from hover_batch.nuclei.stitch import nuclei_of_region
from hover_batch.nuclei.watershed import SobelConstants, instance_map

CONSTANTS = SobelConstants(-1.8e10, 1.3e10, -1.7e10, 1.3e10)


def tiled(canvas: Canvas, core: int, offset: tuple[int, int], post: PostSettings) -> Nuclei:
    """The canvas cut into cores of `core` pixels, the grid moved by `offset`."""
    shifted = Box(-offset[0], -offset[1], canvas.box.x1, canvas.box.y1)
    cores = [
        Box(x, y, x + core, y + core)
        for y in range(shifted.y0, shifted.y1, core)
        for x in range(shifted.x0, shifted.x1, core)
    ]
    return concatenate([nuclei_of_region(canvas.read, box, LAYOUT, post, CONSTANTS) for box in cores])


def whole(canvas: Canvas, post: PostSettings | None = None) -> Nuclei:
    return nuclei_of_region(canvas.read, canvas.box, LAYOUT, post or PostSettings(min_area_px=0), CONSTANTS)


def assert_same(a: Nuclei, b: Nuclei) -> None:
    for field in fields(Nuclei):
        if field.name != "contours":
            x, y = getattr(a, field.name), getattr(b, field.name)
            assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), field.name
    for ring, other in zip(a.contours, b.contours, strict=True):
        assert ring.tobytes() == other.tobytes()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(40, 260), st.integers(40, 260)),
    core=st.integers(32, 256),
    halo=st.integers(0, 64),
    offset=st.tuples(st.integers(0, 255), st.integers(0, 255)),
)
@example(seed=1, size=(256, 256), core=64, halo=0, offset=(0, 0))
@example(seed=2, size=(250, 190), core=32, halo=64, offset=(7, 31))
def test_any_tiling_equals_the_whole(
    seed: int, size: tuple[int, int], core: int, halo: int, offset: tuple[int, int]
) -> None:
    canvas = random_canvas(seed, *size)
    offset = (offset[0] % core, offset[1] % core)
    assert_same(tiled(canvas, core, offset, PostSettings(min_area_px=0, halo=halo)), whole(canvas))


@pytest.mark.slow
@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(600, 2200), st.integers(600, 2200)),
    core=st.integers(256, 2048),
    halo=st.integers(0, 128),
    offset=st.tuples(st.integers(0, 2047), st.integers(0, 2047)),
)
@example(seed=3, size=(2100, 1100), core=256, halo=0, offset=(1, 255))
@example(seed=4, size=(2100, 2100), core=2048, halo=64, offset=(2047, 40))
def test_any_tiling_in_cores_of_a_run_equals_the_whole(
    seed: int, size: tuple[int, int], core: int, halo: int, offset: tuple[int, int]
) -> None:
    canvas = random_canvas(seed, *size)
    offset = (offset[0] % core, offset[1] % core)
    assert_same(tiled(canvas, core, offset, PostSettings(min_area_px=0, halo=halo)), whole(canvas))


@pytest.mark.parametrize("core", [250, 333])
def test_any_tiling_of_real_nuclei_equals_the_whole(noisy_tiles, core: int) -> None:
    canvas = Canvas(noisy_tiles[0].maps)
    nuclei = whole(canvas)
    assert len(nuclei) > 100
    assert_same(tiled(canvas, core, (0, 0), PostSettings(min_area_px=0)), nuclei)


def test_the_whole_is_the_instance_map_of_the_canvas() -> None:
    for seed in range(5):
        canvas = random_canvas(seed, 250, 200)
        instances = instance_map(*(canvas.maps[plane] for plane in (LAYOUT.NP, LAYOUT.H, LAYOUT.V)), CONSTANTS)
        assert_same(whole(canvas), measure(instances, canvas.maps, LAYOUT))


def snake(width: int, height: int) -> Canvas:
    """Round nuclei in one component that winds through the whole canvas, and some that lie alone between."""
    y, x = np.mgrid[:height, :width]
    instances = np.zeros((height, width), np.int32)
    turns = range(12, height - 12, 40)
    centres = [(cx, cy) for k, cy in enumerate(turns) for cx in range(12, width - 12, 11)[:: -1 if k % 2 else 1]]
    # Each row is joined to the next at alternate ends.
    for k, cy in enumerate(turns[:-1]):
        end = 12 if k % 2 else 12 + (width - 25) // 11 * 11
        centres += [(end, cy + 11), (end, cy + 22), (end, cy + 31)]
    for n, (cx, cy) in enumerate(centres, start=1):
        instances[(np.hypot(x - cx, y - cy) < 7) & (instances == 0)] = n
    for cx in range(40, width - 40, 30):
        instances[np.hypot(x - cx, y - 32) < 5] = instances.max() + 1
    types = (instances % (LAYOUT.n_types - 1) + 1).astype(np.uint8) * (instances > 0)
    return Canvas(maps_of(instances, types, np.random.default_rng(0), noise=0))


def test_a_component_larger_than_its_region_is_processed_whole() -> None:
    canvas = snake(500, 220)
    expected = whole(canvas)
    canvas.reads.clear()
    nuclei = nuclei_of_region(
        canvas.read, Box(200, 60, 264, 124), LAYOUT, PostSettings(min_area_px=0, halo=16), CONSTANTS
    )
    assert len(canvas.reads) > 1 and canvas.reads[-1].width > 480
    assert len(nuclei) > 3
    in_core = [Box(200, 60, 264, 124).contains(x, y) for x, y in zip(expected.anchor_x, expected.anchor_y, strict=True)]
    assert_same(nuclei, expected.take(np.array(in_core)))


@pytest.mark.parametrize("core", [64, 100, 300])
def test_a_component_beyond_the_cap_is_cut_alike_by_every_tiling(core: int) -> None:
    canvas = snake(600, 220)
    capped = PostSettings(min_area_px=0, max_component=256, halo=48)
    uncut, cut = whole(canvas), whole(canvas, capped)
    assert not uncut.seam_uncertain.any()
    # The winding one is flagged, those that lie alone are not.
    alone = (np.abs(cut.centroid_y - 32.5) < 1) & (cut.area_px < 90)
    assert alone.sum() > 10
    np.testing.assert_array_equal(cut.seam_uncertain, ~alone)
    # Nothing is reported twice or lost here: both views of a cut agree.
    assert_same(cut.take(np.arange(len(cut))), _flagged(uncut, cut.seam_uncertain))
    assert_same(tiled(canvas, core, (11, 5), capped), cut)


def _flagged(nuclei: Nuclei, seam_uncertain: np.ndarray) -> Nuclei:
    columns = {f.name: getattr(nuclei, f.name) for f in fields(Nuclei)}
    return Nuclei(**{**columns, "seam_uncertain": seam_uncertain})


def test_without_the_rule_tilings_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """The property above is not trivial: processing each component as its window shows it breaks it."""
    monkeypatch.setattr(stitch, "clear_of_margin", lambda bounds, window: np.ones(len(bounds), bool))
    for seed in range(5):
        canvas = random_canvas(seed, 256, 256)
        with pytest.raises(AssertionError):
            assert_same(tiled(canvas, 64, (0, 0), PostSettings(min_area_px=0, halo=0)), whole(canvas))


def test_random_canvases_contain_the_hard_cases() -> None:
    """Components of several instances, nested ones, diagonal neighbours and ones larger than a core all occur."""
    from scipy import ndimage

    several = nested = diagonal = large = 0
    for seed in range(30):
        canvas = random_canvas(seed, 256, 256)
        foreground = canvas.maps[LAYOUT.NP] >= 128
        components, n = ndimage.label(foreground)
        instances = instance_map(*(canvas.maps[plane] for plane in (LAYOUT.NP, LAYOUT.H, LAYOUT.V)), CONSTANTS)
        pairs = np.unique(np.stack([components.ravel(), instances.ravel()]), axis=1)
        several += int((np.bincount(pairs[0, pairs[1] > 0]) > 1).sum())
        diagonal += n - ndimage.label(foreground, np.ones((3, 3)))[1]
        for i, box in enumerate(ndimage.find_objects(components), start=1):
            own = components[box] == i
            nested += bool((foreground[box] & ~own & ndimage.binary_fill_holes(own)).any())
            large += max(own.shape) > 64
    assert min(several, nested, diagonal, large) >= 20, (several, nested, diagonal, large)


def test_loaded_kernels_serve_a_region_of_many_nuclei() -> None:
    program = """
import sys
import numpy as np
from numba.core.dispatcher import Dispatcher
from hover_batch.config import PostSettings
from hover_batch.geometry import Box
from hover_batch.model.heads import MapLayout
from hover_batch.nuclei.stitch import load_kernels, nuclei_of_region
from hover_batch.nuclei.watershed import SobelConstants

def loaded():
    modules = [module for name, module in sys.modules.items() if name.startswith("hover_batch.nuclei.")]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)]
    return sorted((kernel.__name__, str(kernel.signatures)) for kernel in found)

layout = MapLayout(5)
load_kernels(layout, SobelConstants(-1, 1, -1, 1))
before = loaded()
core = Box(0, 0, 400, 400)
blobs = np.kron(np.random.default_rng(3).integers(0, 180, (layout.planes, 50, 50)), np.ones((8, 8)))

def read(box):
    maps = np.zeros((layout.planes, *box.shape), np.uint8)
    common = box.intersect(core)
    maps[:, *common.slices_in(box)] = blobs[:, *common.slices_in(core)]
    return maps

nuclei = nuclei_of_region(read, core, layout, PostSettings(), SobelConstants(-1, 1, -1, 1))
assert len(nuclei.area_px) > 20, len(nuclei.area_px)
assert any(signatures != "[]" for _, signatures in before)
assert loaded() == before
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_an_empty_region_has_no_nuclei() -> None:
    canvas = Canvas(np.zeros((LAYOUT.planes, 50, 50), np.uint8))
    nuclei = nuclei_of_region(canvas.read, Box(0, 0, 64, 64), LAYOUT, PostSettings(min_area_px=0), CONSTANTS)
    assert len(nuclei) == 0 and nuclei.class_probs.shape == (0, LAYOUT.n_types - 1)


def test_window_norm_uses_the_extremes_of_the_region(noisy_tiles) -> None:
    canvas = Canvas(noisy_tiles[0].maps)
    core = Box(200, 200, 700, 700)
    window = canvas.read(core.expand(64))
    extremes = SobelConstants.of_window(window[LAYOUT.H], window[LAYOUT.V])
    assert_same(
        nuclei_of_region(canvas.read, core, LAYOUT, PostSettings(min_area_px=0, sobel_norm="window"), None),
        nuclei_of_region(canvas.read, core, LAYOUT, PostSettings(min_area_px=0), extremes),
    )


def test_debris_is_dropped_by_its_area_alone() -> None:
    """The same nuclei less the small ones, whatever the tiling."""
    canvas = random_canvas(3, 250, 200)
    everything = whole(canvas, PostSettings(min_area_px=0))
    small = everything.area_px < 64
    assert 0 < small.sum() < len(everything)
    kept = everything.take(~small)
    assert_same(whole(canvas, PostSettings(min_area_px=64)), kept)
    assert_same(tiled(canvas, 64, (0, 0), PostSettings(min_area_px=64)), kept)

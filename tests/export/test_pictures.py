"""Pictures: contours lie on their pixels at every scale, and the field with most nuclei is chosen."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotated import nuclei_from
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from hover_batch.export.pictures import OUTLINE, View, densest_field, write_overlay, write_thumbnail
from hover_batch.geometry import Box, Grid, Mpp, Size
from hover_batch.nuclei.table import TableContext, merge_parts, to_arrow, write_part
from hover_batch.taxonomy import CONSEP


def nuclei_table(
    folder: Path, instances: NDArray[np.integer], types: NDArray[np.uint8] | None, scale: float = 1.0
) -> Path:
    height, width = instances.shape
    grid = Grid(Size(round(width * scale), round(height * scale)), scale, scale, Mpp(0.25, 0.25), Size(width, height))
    context = TableContext("s", CONSEP, grid, Mpp(0.25 / scale, 0.25 / scale), "file", None, "m", "0", "0")
    write_part(folder / "part.parquet", to_arrow(nuclei_from(instances, types, 5), context))
    merge_parts([(0, folder / "part.parquet")], folder / "nuclei.parquet", context)
    return folder / "nuclei.parquet"


def read_jpeg(path: Path) -> NDArray[np.uint8]:
    read = cv2.imread(str(path))
    assert read is not None
    return np.asarray(read[:, :, ::-1], np.uint8)


def near(image: NDArray[np.uint8], color: tuple[int, int, int]) -> NDArray[np.bool_]:
    """Where the picture is of this colour, as far as JPEG keeps colours."""
    return np.asarray(np.abs(image.astype(int) - color).max(axis=2) < 60)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.087, 2.0])
def test_contours_lie_on_the_outermost_pixels(tmp_path: Path, scale: float) -> None:
    instances = np.zeros((64, 96), np.uint16)
    instances[20:40, 30:60] = 1
    types = (instances * 2).astype(np.uint8)
    path = nuclei_table(tmp_path, instances, types, scale)
    # The picture has the inference grid's pixels, and starts at its pixel (8, 16).
    view = View(np.full((48, 80, 3), 255, np.uint8), 16 * scale, 8 * scale, scale, scale)
    assert write_overlay(tmp_path / "overlay.jpg", view, path, CONSEP) == 1
    drawn = near(read_jpeg(tmp_path / "overlay.jpg")[:48], CONSEP.classes[2].color)
    expected = np.zeros((48, 80), bool)
    expected[12:32, 14:44] = True
    expected[13:31, 15:43] = False
    np.testing.assert_array_equal(drawn, expected)


def test_contours_hug_annotated_nuclei(tmp_path: Path, data: Path) -> None:
    name, origin = "consep_train_01.png", (300, 200)
    image = cv2.imread(str(data / "nuclei" / "images" / name))[:, :, ::-1]
    instances = cv2.imread(str(data / "nuclei" / "labels" / name), cv2.IMREAD_UNCHANGED)
    path = nuclei_table(tmp_path, instances, None)
    x0, y0 = origin
    part = instances[y0 : y0 + 400, x0 : x0 + 500]
    view = View(np.ascontiguousarray(image[y0 : y0 + 400, x0 : x0 + 500]), x0, y0, 1, 1)
    drawn = write_overlay(tmp_path / "overlay.jpg", view, path, CONSEP)
    assert drawn == len(np.unique(part[part > 0]))
    picture = read_jpeg(tmp_path / "overlay.jpg")[:400]
    changed = np.abs(picture.astype(int) - view.image).max(axis=2) > 100
    same = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.uint8)
    # Rim: pixels of a nucleus beside something else.
    rim = (cv2.erode(part, same) != part) | (cv2.dilate(part, same) != part)
    assert changed.sum() > 3000
    assert (changed & rim).sum() > 0.98 * changed.sum()


def test_the_legend_counts_what_is_drawn(tmp_path: Path) -> None:
    instances = np.zeros((100, 100), np.uint16)
    instances[10:20, 10:20], instances[80:90, 80:90] = 1, 2
    path = nuclei_table(tmp_path, instances, np.full((100, 100), 3, np.uint8))
    for side, lines in ((100, 4), (600, 1)):
        view = View(np.full((50, side, 3), 255, np.uint8), 0, 0, 1, 1)
        assert write_overlay(tmp_path / "overlay.jpg", view, path, CONSEP) == 1
        picture = read_jpeg(tmp_path / "overlay.jpg")
        assert picture.shape == (50 + 22 * lines, side, 3)
        for kind in CONSEP.nuclei:
            assert near(picture[50:], kind.color).sum() > 50


def test_a_field_without_nuclei(tmp_path: Path) -> None:
    path = nuclei_table(tmp_path, np.zeros((50, 50), np.uint16), None)
    view = View(np.full((48, 48, 3), 200, np.uint8), 0, 0, 1, 1)  # whole JPEG blocks, so that nothing rings
    assert write_overlay(tmp_path / "overlay.jpg", view, path, CONSEP) == 0
    assert (read_jpeg(tmp_path / "overlay.jpg")[:48] == 200).all()
    assert densest_field(path, 20, Size(50, 50)) == Box(15, 15, 35, 35)


def test_thumbnail_outline(tmp_path: Path) -> None:
    view = View(np.full((60, 80, 3), 250, np.uint8), 0, 0, 16, 16)
    ring = 16 * np.array([(10, 10), (70, 10), (70, 50), (10, 50), (10, 10)], np.float64)
    write_thumbnail(tmp_path / "thumbnail.jpg", view, [ring])
    picture = read_jpeg(tmp_path / "thumbnail.jpg")
    assert picture.shape == (60, 80, 3)
    assert near(picture, OUTLINE)[9:11, 12:68].all() and near(picture, OUTLINE)[12:48, 69:71].all()
    assert not near(picture, OUTLINE)[13:47, 13:67].any()
    assert (view.image == 250).all()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    points=st.lists(st.tuples(st.floats(0, 310), st.floats(0, 215)), min_size=1, max_size=40),
    side=st.integers(8, 400),
)
def test_densest_field(tmp_path: Path, points: list[tuple[float, float]], side: int) -> None:
    canvas = Size(310, 215)
    x, y = np.array(points).T
    pq.write_table(pa.table({"centroid_x": x, "centroid_y": y}), tmp_path / "nuclei.parquet")
    box = densest_field(tmp_path / "nuclei.parquet", side, canvas)
    assert canvas.box.contains_box(box)
    assert (box.width, box.height) == (min(side, 310), min(side, 215))
    step = side // 4

    def held(x0: int, y0: int) -> int:
        """Nuclei in the 4 × 4 cells from here; a centroid on the canvas's far edge counts as in its last cell."""
        in_x = (np.minimum(x, 309.9) >= x0) & (np.minimum(x, 309.9) < x0 + 4 * step)
        return int((in_x & (np.minimum(y, 214.9) >= y0) & (np.minimum(y, 214.9) < y0 + 4 * step)).sum())

    most = max(held(x0, y0) for x0 in range(0, 310, step) for y0 in range(0, 215, step))
    inside = (x >= box.x0) & (x <= box.x1) & (y >= box.y0) & (y <= box.y1)
    assert inside.sum() >= most > 0

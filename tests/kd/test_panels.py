"""Outlines in the colours of the classes, and panels of pictures."""

from __future__ import annotations

import cv2
import numpy as np

from hover_batch.taxonomy import CONSEP
from kd.panels import GAP, HEADING, UNTYPED, outlined, panel, write_panel

COLOR = {c.id: c.color for c in CONSEP.nuclei}


def test_outlines_run_inside_nuclei_also_where_they_touch():
    instances = np.zeros((8, 12), np.int32)
    instances[2:7, 1:6] = 3
    instances[2:7, 6:11] = 9
    types = np.where(instances == 3, 1, np.where(instances == 9, 2, 0)).astype(np.uint8)
    types[4, 2:5] = 4  # a minority
    types[3, 6:11] = 0  # pixels without a class do not vote
    drawn = outlined(np.zeros((8, 12, 3), np.uint8), instances, types, CONSEP)
    assert (drawn[2, 1:6] == COLOR[1]).all() and (drawn[2:7, 5] == COLOR[1]).all()
    assert (drawn[2:7, 6] == COLOR[2]).all() and (drawn[6, 6:11] == COLOR[2]).all()
    assert not drawn[3:6, 2:5].any() and not drawn[instances == 0].any()


def test_without_types_all_have_one_color_and_the_image_is_left_alone():
    image = np.full((6, 6, 3), 50, np.uint8)
    instances = np.zeros((6, 6), np.int32)
    instances[1:5, 1:5] = 1
    drawn = outlined(image, instances, None, CONSEP)
    assert (drawn[1, 1:5] == UNTYPED).all() and (drawn[2, 2] == 50).all()
    assert (image == 50).all()


def test_no_nucleus_no_outline():
    image = np.full((6, 6, 3), 50, np.uint8)
    assert (outlined(image, np.zeros((6, 6), np.int32), np.zeros((6, 6), np.uint8), CONSEP) == image).all()


def test_a_sheet_holds_every_picture_at_its_place(tmp_path):
    pictures = [[np.full((h, w, 3), 10 * h + w, np.uint8) for w in (5, 7)] for h in (4, 6)]
    sheet = panel(["a", "b"], pictures)
    assert sheet.shape == (HEADING + 4 + 6 + 2 * GAP, 5 + 7 + GAP, 3)
    assert (sheet[HEADING : HEADING + 4, :5] == 45).all()
    assert (sheet[HEADING + 4 + GAP : HEADING + 10 + GAP, 5 + GAP :] == 67).all()
    write_panel(tmp_path / "panels" / "p.png", sheet)
    assert (cv2.imread(str(tmp_path / "panels" / "p.png"))[..., ::-1] == sheet).all()

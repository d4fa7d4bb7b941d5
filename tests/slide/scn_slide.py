"""Write a Leica SCN file whose scanned part starts away from the canvas's corner, so that OpenSlide gives bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

from hover_batch.geometry import Size

_XML = """<?xml version="1.0" encoding="utf-8"?>
<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="urn:uuid:1">
<collection name="c" uuid="urn:uuid:2" sizeX="{canvas_x}" sizeY="{canvas_y}"><barcode/>
<image name="main" uuid="urn:uuid:3"><creationDate>2020-01-01T00:00:00Z</creationDate>
<device model="Leica SCN400" version="1"/>
<pixels sizeX="{width}" sizeY="{height}"><dimension sizeX="{width}" sizeY="{height}" r="0" ifd="0"/></pixels>
<view sizeX="{view_x}" sizeY="{view_y}" offsetX="{x}" offsetY="{y}" spacingZ="0"/>
<scanSettings><objectiveSettings><objective>40</objective></objectiveSettings><illuminationSettings>
<numericalAperture>0.4</numericalAperture><illuminationSource>brightfield</illuminationSource></illuminationSettings>
</scanSettings></image></collection></scn>"""


def write_scn_slide(path: Path, scanned: NDArray[np.uint8], canvas: Size, corner: tuple[int, int]) -> None:
    """Write RGB (h, w, 3) of 0.25 µm a pixel at `corner` (x, y) of a canvas, both in pixels."""
    nm = 250
    height, width = scanned.shape[:2]
    xml = _XML.format(
        canvas_x=canvas.width * nm,
        canvas_y=canvas.height * nm,
        width=width,
        height=height,
        view_x=width * nm,
        view_y=height * nm,
        x=corner[0] * nm,
        y=corner[1] * nm,
    )
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(
            scanned,
            tile=(256, 256),
            photometric="rgb",
            compression="jpeg",
            compressionargs={"level": 97},
            resolution=(40000, 40000),
            resolutionunit="CENTIMETER",
            description=xml,
            metadata=None,
        )

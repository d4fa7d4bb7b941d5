"""Draw a contact sheet: some of the images with their annotations drawn on them, for visual inspection.

It reveals a wrong axis order, a shifted mask or swapped classes, which counts do not.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from hover_batch.errors import InputError
from hover_batch.files import write_atomically
from hover_batch.taxonomy import Taxonomy
from kd.data.samples import Sample
from kd.panels import UNTYPED, outlined

PICTURES, COLUMNS = 24, 6
"""Largest number of pictures, and of pictures per row."""
SIDE = 256
"""Side in pixels of the central part of an image that is shown."""
ZOOM = 2
"""Magnification of the pictures before contours are drawn, so that these hide less of the nuclei."""
MARK = "hover-batch contact sheet"
"""Text in the header of the PNG. A sheet may replace only files that contain it, not a user's picture."""
_FONT, _SIZE, _LINE = cv2.FONT_HERSHEY_SIMPLEX, 0.5, 22


class ContactSheet:
    """Contact sheet of up to PICTURES random samples; the same samples give the same sheet.

    `taxonomy`: classes of the samples.
    """

    def __init__(self, taxonomy: Taxonomy) -> None:
        self._taxonomy = taxonomy
        self._pictures: dict[int, NDArray[np.uint8]] = {}
        """Index of the sample → its picture."""
        self._added = 0
        self._random = np.random.default_rng(0)

    def add(self, sample: Sample) -> None:
        """Add `sample` to the samples from which the pictures of the sheet are chosen at random.

        All samples have the same probability of being among the PICTURES (24) that are shown.
        """
        index = self._added
        self._added += 1
        if index >= PICTURES:  # reservoir sampling
            replaced = int(self._random.integers(index + 1))
            if replaced >= PICTURES:
                return
            del self._pictures[list(self._pictures)[replaced]]
        self._pictures[index] = sample_picture(sample, self._taxonomy)

    def write(self, path: Path) -> None:
        """Write the sheet to `path` as a PNG, in the order of the samples. An existing file is replaced.

        At least one sample must have been added. Raises InputError if the file cannot be written.
        """
        pictures = [self._pictures[index] for index in sorted(self._pictures)]
        columns = min(COLUMNS, len(pictures))
        blank = np.full_like(pictures[0], 255)
        pictures += [blank] * (-len(pictures) % columns)
        rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
        sheet = np.concatenate([*rows, self._legend(rows[0].shape[1])])
        header = PngImagePlugin.PngInfo()
        header.add_text("Software", MARK)
        encoded = io.BytesIO()
        Image.fromarray(sheet).save(encoded, "png", pnginfo=header)
        try:
            write_atomically(path, encoded.getvalue())
        except OSError as error:
            raise InputError(f"--sheet {path}: cannot be written ({error.strerror}); give another file") from error

    def _legend(self, width: int) -> NDArray[np.uint8]:
        strip = np.full((_LINE + 8, width, 3), 255, np.uint8)
        x = 8
        for text, color in [*((c.name, c.color) for c in self._taxonomy.nuclei), ("without a class", UNTYPED)]:
            cv2.rectangle(strip, (x, 9), (x + 12, 21), color, cv2.FILLED)
            cv2.putText(strip, text, (x + 18, 20), _FONT, _SIZE, (0, 0, 0), 1, cv2.LINE_AA)
            x += 18 + cv2.getTextSize(text, _FONT, _SIZE, 1)[0][0] + 20
        return strip


def is_contact_sheet(path: Path) -> bool:
    """True if the file `path` is a contact sheet. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return MARK.encode() in file.read(256)


def sample_picture(sample: Sample, taxonomy: Taxonomy) -> NDArray[np.uint8]:
    """Return a picture (y, x, 3) uint8 RGB of the centre of a sample's image, with a caption below.

    The central SIDE × SIDE (256 × 256) pixels are magnified ZOOM (2) times. Nuclei are outlined in the colours of their
    classes, and nuclei without a class in UNTYPED. The caption has the id, source, tissue and fold of the sample, and
    the numbers of nuclei in the image and in the picture. The pictures of all samples have the same size; smaller
    images are padded with white.

    `taxonomy`: classes of the sample.
    """
    height, width = (min(SIDE, extent) for extent in sample.instances.shape)
    y, x = (sample.instances.shape[0] - height) // 2, (sample.instances.shape[1] - width) // 2
    centre = slice(y, y + height), slice(x, x + width)
    instances = sample.instances[centre]
    types = None if sample.types is None else _magnified(sample.types[centre])
    size = (width * ZOOM, height * ZOOM)
    magnified = np.asarray(cv2.resize(sample.image[centre], size, interpolation=cv2.INTER_CUBIC), np.uint8)
    picture = np.full((SIDE * ZOOM + 2 * _LINE + 4, SIDE * ZOOM + 4, 3), 255, np.uint8)
    picture[: size[1], : size[0]] = outlined(magnified, _magnified(instances), types, taxonomy)
    nuclei, shown = (np.count_nonzero(np.unique(ids)) for ids in (sample.instances, instances))
    origin = " | ".join(filter(None, (sample.source, sample.tissue, f"fold {sample.fold}")))
    for line, text in enumerate([sample.id, f"{origin} | {nuclei} nuclei, {shown} here"]):
        place = (4, SIDE * ZOOM + (line + 1) * _LINE - 6)
        cv2.putText(picture, text, place, _FONT, _SIZE, (0, 0, 0), 1, cv2.LINE_AA)
    return picture


def _magnified(labels: NDArray[Any]) -> NDArray[Any]:
    return labels.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)

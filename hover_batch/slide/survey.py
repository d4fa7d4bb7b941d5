"""Write and read survey.json: a slide's header and tissue mask, saved before its first pixel is predicted.

With it and the prediction store, tables can be made again without the slide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hover_batch.errors import SlideError
from hover_batch.files import to_json, write_atomically
from hover_batch.geometry import Box, Mpp, Size
from hover_batch.slide.headers import SlideInfo
from hover_batch.slide.tissue import TissueMask


def write_survey(path: Path, info: SlideInfo, mask: TissueMask) -> None:
    """Write a slide's properties and its tissue mask to `path` (survey.json); an existing file is replaced atomically.

    The mask is stored as lengths of runs of equal pixels in raster order. The first run is background; its length is 0
    if the first pixel is tissue.

    `info`: properties of the slide. `mask`: tissue mask of the slide.

    OSError if the file cannot be written.
    """
    flat = mask.array.ravel()
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    runs = np.diff(changes, prepend=0, append=len(flat))
    tissue = {
        "shape": list(mask.array.shape),
        "runs": " ".join(map(str, runs.tolist())),
        "level0_per_pixel": list(mask.level0_per_pixel),
        "given": mask.given,
    }
    write_atomically(path, to_json({"slide": asdict(info), "tissue": tissue}))


def read_info(path: Path) -> SlideInfo:
    """Return the properties of a slide from the survey.json at `path`.

    SlideError if the file is corrupted, OSError if it is missing or cannot be read.
    """
    with _content_of(path) as content:
        values = content["slide"]
        bounds, magnification = values["bounds"], values["magnification"]
        converted = {
            "level0": Size(**{name: int(value) for name, value in values["level0"].items()}),
            "mpp": Mpp(**{name: float(value) for name, value in values["mpp"].items()}),
            "bounds": None if bounds is None else Box(**{name: int(value) for name, value in bounds.items()}),
            "downsamples": tuple(map(float, values["downsamples"])),
            "magnification": None if magnification is None else float(magnification),
            "warnings": tuple(_typed(warning, str) for warning in _typed(values["warnings"], list)),
            **{name: _typed(values[name], str) for name in ("mpp_source", "vendor", "fingerprint")},
        }
        return SlideInfo(**{**values, **converted})


def read_tissue(path: Path) -> TissueMask:
    """Return the tissue mask of a slide from the survey.json at `path`.

    SlideError if the file is corrupted, OSError if it is missing or cannot be read.
    """
    with _content_of(path) as content:
        values = content["tissue"]
        runs = np.array(values["runs"].split(), np.int64)
        height, width = values["shape"]
        if runs.sum() != height * width:
            raise ValueError(f"the runs have {runs.sum()} pixels, but the shape is {height} × {width}")
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        x, y = map(float, values["level0_per_pixel"])
        if not (0 < x < math.inf and 0 < y < math.inf):
            raise ValueError(f"level0_per_pixel {x}, {y}: must be positive and finite")
        return TissueMask(flat.reshape(height, width), (x, y), _typed(values["given"], bool))


def _typed(value: Any, kind: type) -> Any:
    """Return `value`. TypeError if it is not of the type `kind`."""
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.40} instead of {kind.__name__}")
    return value


@contextmanager
def _content_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the content of the file; convert exceptions of the block, from corrupted content, to SlideError."""
    try:
        yield json.loads(path.read_bytes())
    except (AttributeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise SlideError(f"{path}: cannot be read ({error!r}); run the slide again") from error

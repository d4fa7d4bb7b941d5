"""Segment and classify every nucleus in cohorts of H&E whole-slide images.

From Python, for a single slide or image (for cohorts use the command)::

    import hover_batch

    table = hover_batch.segment_slide("a.svs", "out")          # like `hover-batch segment`; resumes
    nuclei = hover_batch.load_nuclei(table)                    # one row with a polygon per nucleus
    maps = hover_batch.load_predictions("out/slides/a")        # the network's output for each pixel
    instances, nuclei = hover_batch.load_model("starter").nuclei(rgb)
    cohort = hover_batch.open_cohort("dataset")                # SQL over all slides of a data set

These names are imported on first use, so that importing the package itself is fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hover_batch.environment import complete_environment
from hover_batch.version import __version__

if TYPE_CHECKING:
    from hover_batch.api import (
        Model,
        Plane,
        Predictions,
        load_model,
        load_nuclei,
        load_predictions,
        open_cohort,
        segment_slide,
    )

__all__ = [
    "Model",
    "Plane",
    "Predictions",
    "__version__",
    "load_model",
    "load_nuclei",
    "load_predictions",
    "open_cohort",
    "segment_slide",
]

complete_environment()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hover_batch import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return __all__

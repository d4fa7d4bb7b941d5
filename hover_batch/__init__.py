"""Segment and classify every nucleus in cohorts of H&E whole-slide images.

From Python, for one slide or one picture (cohorts are the command's)::

    import hover_batch

    table = hover_batch.segment_slide("a.svs", "out")          # as `hover-batch segment` does; resumes
    nuclei = hover_batch.load_nuclei(table)                    # a row and a polygon for each nucleus
    maps = hover_batch.load_predictions("out/slides/a")        # what the network said, pixel by pixel
    instances, nuclei = hover_batch.load_model("starter").nuclei(rgb)

These names are imported when they are first asked for: the package itself is imported at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hover_batch.environment import complete_environment
from hover_batch.version import __version__

if TYPE_CHECKING:
    from hover_batch.api import Model, Plane, Predictions, load_model, load_nuclei, load_predictions, segment_slide

__all__ = [
    "Model",
    "Plane",
    "Predictions",
    "__version__",
    "load_model",
    "load_nuclei",
    "load_predictions",
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

"""Write the page of a comparison: a single file whose text is escaped, and which loads nothing from elsewhere."""

from __future__ import annotations

from hover_batch.diff.places import COLORS
from hover_batch.diff.run import RunsDiff
from hover_batch.report.page import page_environment
from hover_batch.version import __version__

ROWS = 500
"""Maximum number of slides in the table of the page."""


def render(found: RunsDiff) -> str:
    """Return the page of a comparison as one HTML document that includes the pictures.

    `found`: result of `diff_runs`.
    """
    environment = page_environment("hover_batch.diff")
    environment.filters["change"] = change
    return environment.get_template("diff.html").render(
        found=found,
        cohort=found.cohort,
        means={name: found.cohort.mean_change(name) for name in found.cohort.endpoints},
        colors=COLORS,
        rows=ROWS,
        version=__version__,
    )


def change(value: float | None) -> str:
    """Format `value`, a relative change (0.01 is 1 %), as a signed percentage such as +1.00%; a dash if it is None."""
    return "–" if value is None else f"{value:+.2%}"

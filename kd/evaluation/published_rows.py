"""Published tables to compare with; cells are as printed.

Source: Tommasino et al., "HoVer-UNet", arXiv 2311.12553, Tables 1 to 3 and section 3. The paper quotes the rows of the
other models on PanNuke.
"""

from __future__ import annotations

from dataclasses import dataclass

from hover_batch.taxonomy import PANNUKE, Taxonomy
from kd.evaluation.remap import PAPER_CONSEP

PAPER = "arXiv 2311.12553"
"""Reference of the paper."""


@dataclass(frozen=True)
class Column:
    """Column of a table."""

    title: str
    """Title of the column."""
    path: tuple[str, ...]
    """Keys of the value in the scores of a source, or in the cost."""
    scale: float = 1.0
    """Factor by which the value is multiplied."""
    digits: int = 4
    """Number of decimal places."""
    setting: bool = False
    """True for a setting, which is the same for all runs of a row, so that it has no standard deviation."""


MIN_AREA = Column("min px", ("min_area_px",), digits=0, setting=True)
"""Smallest area in pixels of a predicted nucleus."""
REFERENCE_MIN_AREA = "10"
"""MIN_AREA of the published rows, which were computed with HoVerNet's post-processing."""


@dataclass(frozen=True)
class PaperTable:
    """Table of the paper."""

    name: str
    """Name of the file to write, without its suffix."""
    title: str
    """Heading of the table."""
    source: str
    """Source whose scores are shown."""
    taxonomy: Taxonomy
    """Classes in which the scores must have been computed."""
    columns: tuple[Column, ...]
    """Columns of the table."""
    rows: dict[str, tuple[str, ...]]
    """Published cells by model, one for each column; "" if unknown."""
    origin: str
    """Reference for the published rows."""
    notes: tuple[str, ...] = ()
    """Sentences below the table."""
    tests: tuple[str, ...] = ()
    """Folds of the tests of which the published rows are the mean; () if they are from one test."""


def _of_classes(kind: str, *names: str) -> tuple[Column, ...]:
    return tuple(Column(name.capitalize(), (kind, name)) for name in names)


PER_TILE = Column("s per tile", ("seconds_per_tile",), digits=2)
"""Seconds for a tile of 1000² pixels, network and post-processing."""

_FIVE = tuple(c.name for c in PANNUKE.nuclei)
PANNUKE_TESTS = ("1", "3", "3")
"""Folds of the tests of PanNuke's three splits: train 1, 2, 3; validation 2, 1, 2; test 3, 3, 1."""
_SEEN = (
    "HoVer-UNet's released code uses the published HoVerNet weights as its teacher. They were fine-tuned on all of "
    "PanNuke (vqdang/hover_net issue 275), so the teacher had seen every test fold."
)

TABLES = (
    PaperTable(
        "pannuke_pq",
        "Table 1: panoptic quality on PanNuke",
        "pannuke",
        PANNUKE,
        (Column("PQ_B", ("bpq",)), Column("PQ_M", ("mpq",)), *_of_classes("pq_c", *_FIVE)),
        {
            "DIST": ("0.5346", "0.3406", "0.4390", "0.3430", "0.2750", "0.0000", "0.2900"),
            "Mask-RCNN": ("0.5528", "0.3688", "0.4720", "0.2900", "0.3000", "0.0690", "0.4030"),
            "Micro-Net": ("0.6053", "0.4059", "0.5040", "0.3330", "0.3340", "0.0510", "0.4420"),
            "HoVerNet": ("0.6596", "0.4629", "0.5510", "0.4170", "0.3880", "0.1390", "0.4910"),
            "HoVer-UNet": ("0.6286", "0.4475", "0.5239", "0.4009", "0.3794", "0.0762", "0.4779"),
        },
        f"{PAPER}, Table 1",
        (_SEEN,),
        PANNUKE_TESTS,
    ),
    PaperTable(
        "pannuke_f",
        "Table 2: detection and classification on PanNuke",
        "pannuke",
        PANNUKE,
        (Column("F_d", ("f_d",)), *_of_classes("f_c", *_FIVE)),
        {
            "DIST": ("0.73", "0.50", "0.42", "0.39", "0.00", "0.35"),
            "Mask-RCNN": ("0.72", "0.59", "0.50", "0.42", "0.22", "0.52"),
            "Micro-Net": ("0.80", "0.62", "0.52", "0.47", "0.19", "0.58"),
            "HoVerNet": ("0.80", "0.62", "0.54", "0.49", "0.31", "0.56"),
            "HoVer-UNet": ("0.79", "0.64", "0.53", "0.48", "0.18", "0.62"),
        },
        f"{PAPER}, Table 2",
        (_SEEN,),
        PANNUKE_TESTS,
    ),
    PaperTable(
        "consep_external",
        "Table 3: CoNSeP by models trained on PanNuke",
        "consep",
        PAPER_CONSEP,
        (
            Column("F_d", ("f_d",)),
            Column("PQ", ("pq",)),
            *_of_classes("f_c", "inflammatory", "miscellaneous", "neoplastic", "epithelial"),
            PER_TILE,
        ),
        {
            "HoVerNet": ("0.818", "0.526", "0.758", "0.559", "", "", "48"),
            "HoVer-UNet": ("0.742", "0.594", "0.681", "0.557", "", "", "17"),
        },
        f"{PAPER}, Table 3",
        (
            "The columns of the published rows were identified from the paper's text. Its F scores of neoplastic and "
            "epithelial are 0.495 and 0.415 for HoVerNet, 0.603 and 0.599 for HoVer-UNet, but the text does not say "
            "which is which. Its times are approximate.",
            "Seconds per tile: network and post-processing of 1000 × 1000 pixels; of ours, the median of three runs. "
            "Compare only times from one machine.",
        ),
    ),
)

COST_COLUMNS = (
    Column("M parameters", ("parameters",), 1e-6, 2),
    Column("patch px", ("patch",), digits=0),
    Column("GMac per patch", ("macs_per_patch",), 1e-9, 2),
    Column("kMac per kept pixel", ("macs_per_kept_pixel",), 1e-3, 1),
    Column("s per patch", ("seconds_per_patch",), digits=4),
    PER_TILE,
)
COST_ROWS = {
    "HoVerNet": ("", "256", "149.73", "", "0.835", ""),
    "HoVer-UNet, mit_b3": ("", "256", "10.63", "", "0.065", ""),
}
COST_ORIGIN = f"{PAPER}, section 3"
COST_NOTES = (
    "Seconds per patch are the mean over a batch of 16 patches, for the network alone; seconds per tile are for 1000² "
    "pixels, with post-processing. Compare only times from one machine.",
)

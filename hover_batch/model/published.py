"""Published models that can be imported, with their classes and training data. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from hover_batch.taxonomy import CONSEP, MONUSAC, NUCLEI, PANNUKE, Taxonomy

HUB = "https://huggingface.co/TIACentre/TIAToolbox_pretrained_weights"
"""Repository from which tiatoolbox downloads them, each as NAME.pth."""


CELLVIT_LOGS = "mean of three folds, from the logs in TIO-IKIM/CellViT, logs_paper"
"""Source of CellViT's scores: `inference_results.json` under logs_paper/PanNuke/CellViTHV at 05097e1."""


@dataclass(frozen=True)
class Kind:
    """Published model that can be imported."""

    architecture: str
    """Name of the architecture in cards."""
    taxonomy: Taxonomy
    """Classes of the model."""
    types: int
    """Number of channels of the type branch; 0 without one."""
    seen: str
    """Images on which the model was trained, in words."""
    licence: str
    """Licence of the weights, in words."""
    by_name: bool = True
    """Whether tiatoolbox can download it by its name."""
    encoders: tuple[str, ...] = ("",)
    """Variants of the architecture that it may have, the published one first."""
    mpp: float = 0.25
    """Pixel size in µm at which it was trained; 0.25 is 40×."""
    source: str = HUB
    """Where the weights are published."""
    scores: str = "not recorded here"
    """Published scores, and where they are from."""
    seam_exact: bool = True
    """Whether a nucleus is the same in every division of a slide into units."""


_PANNUKE = "CC BY-NC-SA 4.0, research only: trained on PanNuke"
_NULITE = "https://github.com/CosmoIknosLab/NuLite"
_CELLVIT = "https://github.com/TIO-IKIM/CellViT"
_COMMONS = "Apache 2.0 with Commons Clause; research only: trained on PanNuke, CC BY-NC-SA 4.0"
_UNKNOWN = "of the source's authors: see where the checkpoint was published"
KINDS = {
    "hovernet_fast-pannuke": Kind(
        "hovernet-fast",
        PANNUKE,
        6,
        "PanNuke; the published weights were fine-tuned on the whole data set (vqdang/hover_net issue 275), so that "
        "scores on any of its folds are contaminated",
        _PANNUKE,
        scores="PanNuke mPQ 0.463, bPQ 0.660, F_d 0.80 (trained on folds; arXiv 2311.12553)",
    ),
    "hovernet_fast-monusac": Kind("hovernet-fast", MONUSAC, 5, "MoNuSAC", _UNKNOWN),
    "hovernet_original-consep": Kind("hovernet-original", CONSEP, 5, "CoNSeP, training part", _UNKNOWN),
    "hovernet_original-kumar": Kind(
        "hovernet-original",
        NUCLEI,
        0,
        "Kumar, if it is tiatoolbox's; hover_net's checkpoints without types of CPM17 and CoNSeP look the same",
        _UNKNOWN,
    ),
    "hover-unet-pannuke": Kind(
        "unet",
        PANNUKE,
        6,
        "PanNuke, distilled from hovernet_fast-pannuke, which has seen all of it; which folds is not in the file",
        _PANNUKE,
        by_name=False,
        source="https://github.com/DIAGNijmegen/HoVer-UNet",
        scores="PanNuke mPQ 0.448, bPQ 0.629, F_d 0.79 (trained on folds; arXiv 2311.12553)",
        encoders=("mit_b2", "mit_b0", "mit_b1", "mit_b3", "mit_b4", "mit_b5"),
    ),
    **{
        f"nulite-{size}": Kind(
            "nulite",
            PANNUKE,
            6,
            "PanNuke, all of it, so that scores on any of its folds are contaminated",
            "Apache 2.0; research only: trained on PanNuke, CC BY-NC-SA 4.0",
            by_name=False,
            encoders=encoders,
            source=_NULITE,
        )
        for size, encoders in {
            "t": ("fastvit_s12",),
            "s": ("fastvit_sa12", "fastvit_t12", "fastvit_t8"),
            "m": ("fastvit_sa24", "fastvit_sa36"),
            "h": ("fastvit_ma36",),
        }.items()
    },
    **{
        f"cellvit-{encoder.lower().removeprefix('vit-')}{suffix}": Kind(
            "cellvit",
            PANNUKE,
            6,
            "PanNuke, 90 % of all folds, so that scores on any of its folds are contaminated",
            _COMMONS,
            by_name=False,
            encoders=(encoder,),
            mpp=mpp,
            source=_CELLVIT,
            scores=scores,
        )
        for encoder, suffix, mpp, scores in (
            ("ViT-256", "", 0.25, f"PanNuke mPQ 0.483, bPQ 0.654, F_d 0.824 ({CELLVIT_LOGS})"),
            ("ViT-256", "-x20", 0.5, f"PanNuke mPQ 0.372, bPQ 0.523, F_d 0.710 ({CELLVIT_LOGS})"),
            ("SAM-B", "", 0.25, f"PanNuke mPQ 0.491, bPQ 0.663, F_d 0.828 ({CELLVIT_LOGS})"),
            ("SAM-L", "", 0.25, f"PanNuke mPQ 0.497, bPQ 0.666, F_d 0.829 ({CELLVIT_LOGS})"),
            ("SAM-H", "", 0.25, f"PanNuke mPQ 0.496, bPQ 0.666, F_d 0.829 ({CELLVIT_LOGS})"),
            ("SAM-H", "-x20", 0.5, f"PanNuke mPQ 0.399, bPQ 0.552, F_d 0.731 ({CELLVIT_LOGS})"),
        )
    },
}
COSTS = {
    "hovernet_fast-pannuke": (37639626, 4582215),
    "hovernet_fast-monusac": (37639561, 4582149),
    "hovernet_original-consep": (54744457, 10510643),
    "hovernet_original-kumar": (45028676, 8294798),
    "hover-unet-pannuke": (27478314, 164455),
    "nulite-t": (12049885, 442781),
    "nulite-s": (14157277, 446316),
    "nulite-m": (24130525, 489965),
    "nulite-h": (47929201, 750026),
    "cellvit-256": (46750349, 2309844),
    "cellvit-256-x20": (46750349, 2309844),
    "cellvit-sam-b": (146094557, 3513562),
    "cellvit-sam-l": (367847645, 5316970),
    "cellvit-sam-h": (699741149, 8000275),
    "cellvit-sam-h-x20": (699741149, 8000275),
}
"""Number of weights of each kind, and its multiply-accumulates for each kept pixel (`python -m benchmarks.costs`)."""

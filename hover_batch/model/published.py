"""Published models that can be imported, with their classes and training data. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from hover_batch.taxonomy import CONSEP, MONUSAC, NUCLEI, PANNUKE, Taxonomy

HUB = "https://huggingface.co/TIACentre/TIAToolbox_pretrained_weights"
"""Repository from which tiatoolbox downloads them, each as NAME.pth."""


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


_PANNUKE = "CC BY-NC-SA 4.0, research only: trained on PanNuke"
_UNKNOWN = "of the source's authors: see where the checkpoint was published"
KINDS = {
    "hovernet_fast-pannuke": Kind(
        "hovernet-fast",
        PANNUKE,
        6,
        "PanNuke; the published weights were fine-tuned on the whole data set (vqdang/hover_net issue 275), so that "
        "scores on any of its folds are contaminated",
        _PANNUKE,
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
        encoders=("mit_b2", "mit_b0", "mit_b1", "mit_b3", "mit_b4", "mit_b5"),
    ),
}

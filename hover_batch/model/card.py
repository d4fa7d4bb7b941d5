"""Model card: what a package says about its network, as JSON in the file. Needs no torch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hover_batch.config import InferSettings
from hover_batch.errors import InputError, PackageError
from hover_batch.taxonomy import Taxonomy
from hover_batch.uncertainty import Uncertainty

if TYPE_CHECKING:
    from hover_batch.model.heads import MapLayout

FORMAT = 1
MAX_TILE = 4096
"""Limit of `tile_in` in pixels; above it a single tile of a HoVerNet takes tens of GB."""
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("name", "architecture", "system", "encoder", "licence", "input_scaling", "weights_sha256"), (str,)
    ),
    **dict.fromkeys(("tile_in", "tile_out"), (int,)),
    **dict.fromkeys(("taxonomy", "sobel", "training", "metrics", "limits", "uncertainty"), (dict,)),
    "mpp": (int, float),
    "seam_exact": (bool,),
}
"""JSON types of the card's entries. Packages are untrusted, so every entry is checked."""
_SOBEL = {"h_min", "h_max", "v_min", "v_max"}


@dataclass(frozen=True, kw_only=True)
class Card:
    """Description of a model: architecture, classes, training data and scores.

    PackageError if `tile_out` is below 32, `tile_in` is above MAX_TILE (4096), or `tile_in` - `tile_out` is negative or
    odd.
    """

    name: str
    """Name of the model, one line."""
    architecture: str
    """Name of an architecture (see `hover_batch.model.architectures`)."""
    encoder: str
    """Variant of the architecture, such as its encoder's name; empty if it has none."""
    taxonomy: Taxonomy
    """Classes of the model."""
    mpp: float
    """Pixel size of the training images in µm."""
    tile_in: int
    """Side in pixels of a tile, the network's input."""
    tile_out: int
    """Side in pixels of the central part of a tile whose output is kept."""
    sobel: Mapping[str, float]
    """The four constants of `hover_batch.nuclei.watershed.SobelConstants` by name; empty for systems without them."""
    licence: str
    """Licence of the weights, in words."""
    input_scaling: str = "RGB / 255"
    """Scaling of the pixels; only "RGB / 255" is supported."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Training data and settings, as recorded at export."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Scores by split and data set, and the calibration."""
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Lowest and highest value of each measure of a slide (`hover_batch.quality.flags.LIMITS`) that the training images
    support; measures without an entry have default limits."""
    uncertainty: Mapping[str, Any] = field(default_factory=dict)
    """Measured errors of the model (`hover_batch.uncertainty.Uncertainty` as JSON); empty if they were not measured."""
    seam_exact: bool = True
    """Whether a nucleus depends on its own connected component alone. False if the nuclei of a tile are merged by
    score, and those on its edges by overlap, so that they depend on where tiles lie, but not on units."""
    system: str = "hover"
    """What the network learned and how its output becomes nuclei: a key of `hover_batch.model.heads.SYSTEMS`."""
    weights_sha256: str = ""
    """SHA-256 of names, dtypes, shapes and bytes of all tensors (see `tensors_sha256`)."""

    def __post_init__(self) -> None:
        margin = self.tile_in - self.tile_out
        if margin < 0 or margin % 2 or self.tile_out < 32 or self.tile_in > MAX_TILE:
            raise PackageError(
                f"package {self.name}: tile_in {self.tile_in} and tile_out {self.tile_out} are invalid: tile_out is at "
                f"least 32, tile_in at most {MAX_TILE}, and their difference even and not negative; export it again"
            )

    @property
    def margin(self) -> int:
        """Context on each side of the kept part of a tile, in pixels: (tile_in - tile_out) / 2."""
        return (self.tile_in - self.tile_out) // 2

    @property
    def layout(self) -> MapLayout:
        """Layout of the planes of this model's maps."""
        from hover_batch.model.heads import MapLayout  # imports numpy, which --help does not need

        return MapLayout(len(self.taxonomy.classes))

    def check_sobel_norm(self, sobel_norm: str) -> None:
        """Check that the user's choice of --sobel-norm can be used with this model.

        `sobel_norm`: "fixed" or "window". InputError for "window" if the model has no Sobel maps.
        """
        if sobel_norm == "window" and self.system != "hover":
            raise InputError(
                f"--sobel-norm window: {self.name} has no Sobel maps, since its nuclei are found as by {self.system}; "
                "leave the option out"
            )

    def supported(self, settings: InferSettings) -> InferSettings:
        """Return `settings`, with the runtime torch if it is `auto` and only torch can run this model's network.

        InputError if only torch can run the network, and the runtime is neither `auto` nor torch.
        """
        from hover_batch.model.heads import SYSTEMS

        if not SYSTEMS[self.system].torch_only or settings.runtime == "torch":
            return settings
        if settings.runtime != "auto":
            raise InputError(
                f"--runtime {settings.runtime}: {self.name} runs with torch only, because its network does not do the "
                "same work for each image; leave --runtime out"
            )
        return replace(settings, runtime="torch")

    def to_json(self) -> dict[str, Any]:
        """Return the card as JSON values by name; the inverse of `from_json`.

        `limits`, `uncertainty`, `seam_exact` and `system` are left out if they have their default value. They were
        added in later versions, and old packages must keep the same bytes when they are written again.
        """
        values = {"format": FORMAT, **asdict(self), "taxonomy": self.taxonomy.to_json()}
        defaults = {"limits": {}, "uncertainty": {}, "seam_exact": True, "system": "hover"}
        return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}

    @classmethod
    def from_json(cls, data: Any) -> Card:
        """Return the card in `data`, JSON values as `to_json` returns them. `data` may come from an untrusted file.

        PackageError if a required entry is missing, an entry is unknown or invalid, or `format` is not FORMAT.
        """
        if not isinstance(data, Mapping):
            raise PackageError("the card is not a JSON object")
        values = dict(data)
        if values.pop("format", None) != FORMAT:
            raise PackageError("the package was written by another version of hover-batch; export it again")
        for name, value in values.items():
            if name not in _TYPES:
                raise PackageError(f"the card has the unknown entry {name[:40]!r}")
            if type(value) not in _TYPES[name]:
                words = " or ".join(kind.__name__ for kind in _TYPES[name])
                raise PackageError(f"the card's {name} is {short(value)}, not of the type {words}")
        try:
            card = cls(**(values | {"taxonomy": Taxonomy.from_json(values["taxonomy"])}))
        except (KeyError, TypeError, ValueError) as error:  # a missing entry, or invalid classes
            raise PackageError(f"the card is not complete: {short(str(error))}") from error
        card._check_values()
        return card

    def _check_values(self) -> None:
        if not self.name or len(self.name) > 200 or not self.name.isprintable():
            raise PackageError(f"the card's name is {short(self.name)}: must be one line of text")
        if self.input_scaling != "RGB / 255":
            raise PackageError(f"the card's input_scaling is {short(self.input_scaling)}; only RGB / 255 is supported")
        if not re.fullmatch(
            r"[\w.-]*", self.encoder, re.ASCII
        ):  # timm would download encoders named in some other forms
            raise PackageError(f"the card's encoder is {short(self.encoder)}: must be a name")
        if not 0.01 <= self.mpp <= 100:
            raise PackageError(f"the card's mpp is {self.mpp}: must be 0.01 to 100 µm per pixel")
        from hover_batch.model.heads import SYSTEMS

        if self.system not in SYSTEMS:
            raise PackageError(f"the card's system is {short(self.system)}: must be one of {', '.join(SYSTEMS)}")
        if self.seam_exact and not SYSTEMS[self.system].seam_exact:
            raise PackageError(f"the card's seam_exact is true: must be false for the system {self.system}")
        wanted = _SOBEL if self.system == "hover" else set()
        numbers = [v for v in self.sobel.values() if type(v) in (int, float) and math.isfinite(v)]
        if self.sobel.keys() != wanted or len(numbers) != len(wanted):
            names = ", ".join(sorted(wanted)) or f"empty for the system {self.system}"
            raise PackageError(f"the card's sobel is {short(self.sobel)}: must be {names}")
        if wanted and not all(self.sobel[f"{axis}_min"] <= self.sobel[f"{axis}_max"] for axis in "hv"):
            raise PackageError(f"the card's sobel is {short(self.sobel)}: a minimum is above its maximum")
        try:
            json.dumps(self.metrics, allow_nan=False)
        except ValueError as error:
            raise PackageError("the card's metrics hold a number that is not finite") from error
        for name, bounds in self.limits.items():
            pair = bounds if isinstance(bounds, (list, tuple)) else ()
            if (
                len(pair) != 2
                or not all(type(v) in (int, float) and math.isfinite(v) for v in pair)
                or pair[0] > pair[1]
            ):
                raise PackageError(
                    f"the card's limits of {short(name)} are {short(bounds)}: must be two numbers in order"
                )
        try:
            Uncertainty.from_json(self.uncertainty)
        except ValueError as error:
            raise PackageError(f"the card's uncertainty is invalid: {short(str(error))}") from error


def short(value: object) -> str:
    """Return `value` as ASCII text for a message: quoted, and cut after 100 characters.

    Non-ASCII characters are escaped. A value that is not a string is represented by its repr.
    """
    text = value if isinstance(value, str) else repr(value)
    return ascii(text if len(text) <= 100 else f"{text[:100]}…")

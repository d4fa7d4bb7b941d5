"""Model packages: safetensors files with the model card inside, so that one file is enough for a run.

The card is JSON under the key `hover_batch` of the file's metadata. Reading it needs no torch; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hover_batch.errors import PackageError
from hover_batch.files import write_atomically
from hover_batch.model.cache import cached_package, is_package_name
from hover_batch.taxonomy import Taxonomy

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hover_batch.model.heads import MapLayout

CARD_KEY = "hover_batch"
FORMAT = 1
ARCHITECTURES = ("unet", "hovernet-fast", "hovernet-original")
"""Architectures of networks: the students' U-Net, and HoVerNet's two published forms."""
STARTER = Path(__file__).parent.parent / "assets" / "starter.safetensors"
MAX_TILE = 4096
"""Limit of `tile_in` in pixels; above it a single tile of a HoVerNet takes tens of GB."""
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("name", "architecture", "encoder", "licence", "input_scaling", "weights_sha256"), (str,)),
    **dict.fromkeys(("tile_in", "tile_out"), (int,)),
    **dict.fromkeys(("taxonomy", "sobel", "training", "metrics", "limits"), (dict,)),
    "mpp": (int, float),
}
"""JSON types of the card's entries. Packages are untrusted, so every entry is checked."""
_SOBEL = {"h_min", "h_max", "v_min", "v_max"}


@dataclass(frozen=True, kw_only=True)
class Card:
    """Description of a model: architecture, classes, training data and scores.

    PackageError if the tile sizes are invalid.
    """

    name: str
    """Name of the model, one line."""
    architecture: str
    """One of ARCHITECTURES."""
    encoder: str
    """Encoder's name in segmentation-models-pytorch; empty for HoVerNet."""
    taxonomy: Taxonomy
    """Classes of the model."""
    mpp: float
    """Pixel size of the training images in µm."""
    tile_in: int
    """Side in pixels of a tile, the network's input."""
    tile_out: int
    """Side in pixels of the central part of a tile whose output is kept."""
    sobel: Mapping[str, float]
    """The four constants of `hover_batch.nuclei.watershed.SobelConstants` by name."""
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
        """Context in pixels on each side of the kept part of a tile."""
        return (self.tile_in - self.tile_out) // 2

    @property
    def layout(self) -> MapLayout:
        """Planes of this model's maps."""
        from hover_batch.model.heads import MapLayout  # imports numpy, which --help does not need

        return MapLayout(len(self.taxonomy.classes))

    def to_json(self) -> dict[str, Any]:
        """Return the card as JSON values by name, without empty `limits`; the inverse of `from_json`."""
        values = {"format": FORMAT, **asdict(self), "taxonomy": self.taxonomy.to_json()}
        return values if self.limits else {name: value for name, value in values.items() if name != "limits"}

    @classmethod
    def from_json(cls, data: Any) -> Card:
        """Return the card that `to_json` gave as `data`, which may come from an untrusted file.

        PackageError if an entry is missing, unknown or invalid, or the format is of another version.
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
                raise PackageError(f"the card's {name} is {_short(value)}, not of the type {words}")
        try:
            card = cls(**(values | {"taxonomy": Taxonomy.from_json(values["taxonomy"])}))
        except (KeyError, TypeError, ValueError) as error:  # a missing entry, or invalid classes
            raise PackageError(f"the card is not complete: {_short(str(error))}") from error
        card._check_values()
        return card

    def _check_values(self) -> None:
        if not self.name or len(self.name) > 200 or not self.name.isprintable():
            raise PackageError(f"the card's name is {_short(self.name)}: must be one line of text")
        if self.input_scaling != "RGB / 255":
            raise PackageError(f"the card's input_scaling is {_short(self.input_scaling)}; only RGB / 255 is supported")
        if not re.fullmatch(
            r"[\w.-]*", self.encoder, re.ASCII
        ):  # timm would download encoders named in some other forms
            raise PackageError(f"the card's encoder is {_short(self.encoder)}: must be a name")
        if not 0.01 <= self.mpp <= 100:
            raise PackageError(f"the card's mpp is {self.mpp}: must be 0.01 to 100 µm per pixel")
        numbers = [v for v in self.sobel.values() if type(v) in (int, float) and math.isfinite(v)]
        if self.sobel.keys() != _SOBEL or len(numbers) != len(_SOBEL):
            raise PackageError(f"the card's sobel is {_short(self.sobel)}: must be {', '.join(sorted(_SOBEL))}")
        if not all(self.sobel[f"{axis}_min"] <= self.sobel[f"{axis}_max"] for axis in "hv"):
            raise PackageError(f"the card's sobel is {_short(self.sobel)}: a minimum is above its maximum")
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
                    f"the card's limits of {_short(name)} are {_short(bounds)}: must be two numbers in order"
                )


def _short(value: object) -> str:
    """Format any value for a message, in at most 100 characters."""
    text = value if isinstance(value, str) else repr(value)
    return ascii(text if len(text) <= 100 else f"{text[:100]}…")


@dataclass(frozen=True)
class Package:
    """Package on disk, without its weights in memory."""

    path: Path
    """File of the package."""
    card: Card
    """Card in the file."""
    sha256: str
    """Hex SHA-256 of the whole file, which identifies the package in a run."""


def find_package(name_or_path: str, option: str = "--model") -> Package:
    """Find a package and read its card: `starter`, a .safetensors file, a folder with one, or a name in the cache.

    An existing path takes precedence over a name in the cache. `option`: option or argument by which the user named it,
    for messages. PackageError if there is no such package, it cannot be read, or it has no valid card.
    """
    path = STARTER if name_or_path == "starter" else Path(name_or_path)
    try:
        if is_package_name(name_or_path) and not path.exists():
            path = cached_package(name_or_path)
        return _read(path, name_or_path, option)
    except OSError as error:
        raise PackageError(f"{option} {path}: cannot be read ({error.strerror or error})") from error


def _read(path: Path, named: str, option: str) -> Package:
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise PackageError(f"{option} {path}: the folder holds {len(found)} .safetensors files, not one")
        path = found[0]
    if not path.is_file():
        raise PackageError(
            f"{option} {named}: no such package; give `starter`, the path of a .safetensors file, or a name that "
            "`hover-batch models list` shows (`models import NAME` downloads published ones)"
        )
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as f:
            metadata = f.metadata() or {}
    except SafetensorError as error:
        raise PackageError(
            f"{option} {path}: not a safetensors file ({error}); `hover-batch models import` turns published "
            "checkpoints into packages"
        ) from error
    if CARD_KEY not in metadata:
        raise PackageError(
            f"{option} {path}: no hover-batch card inside; make one with `hover-batch kd package` or `models import`"
        )
    try:
        card = Card.from_json(json.loads(metadata[CARD_KEY]))
    except (ValueError, RecursionError, PackageError) as error:
        raise PackageError(f"{option} {path}: the card inside cannot be read ({error})") from error
    with path.open("rb") as whole:
        return Package(path, card, hashlib.file_digest(whole, "sha256").hexdigest())


def load_network(package: Package) -> nn.Module:
    """Return the package's network with its weights, float32 on the CPU, in evaluation mode and without gradients.

    PackageError if the weights cannot be read, do not match the card's hash, or do not fit the architecture.
    """
    tensors = load_tensors(package)
    try:
        network = _build(package.card, tensors)
        network.load_state_dict(tensors)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        # Raised by the libraries for unknown encoders and for wrong shapes.
        reason = " ".join(str(error).split()[:40]) or type(error).__name__
        raise PackageError(f"package {package.path}: the weights do not fit its card: {reason}") from error
    return network.eval().requires_grad_(False)


def load_tensors(package: Package) -> dict[str, torch.Tensor]:
    """Return the package's weights by name, on the CPU and in the dtypes in which they are stored.

    PackageError if they cannot be read or do not match the card's hash.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(package.path)
        matches = package.card.weights_sha256 == tensors_sha256(tensors)
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a dtype that numpy lacks
        raise PackageError(
            f"package {package.path}: the weights cannot be read ({error}); download it again"
        ) from error
    if not matches:
        raise PackageError(f"package {package.path}: the weights do not match their card; download the file again")
    return tensors


def _build(card: Card, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Build the card's network with random weights; for HoVerNet the tensors decide whether it has a type branch."""
    from hover_batch.model.student import StudentArch, build_student
    from hover_batch.model.teacher import arch_of, build_teacher

    n_types = len(card.taxonomy.classes)
    if card.architecture == "unet":
        if card.tile_in % 32:
            raise PackageError(f"package {card.name}: tile_in is {card.tile_in}; that of a unet is a multiple of 32")
        return build_student(StudentArch(card.encoder, n_types))
    if card.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise PackageError(f"package {card.name}: architecture {card.architecture} is not known; known are {known}")
    try:
        arch = arch_of(tensors)
    except KeyError as error:
        raise PackageError(f"package {card.name}: {card.architecture} needs the tensor {error}") from error
    if card.architecture != f"hovernet-{arch.form}" or n_types != (arch.n_types or 2):
        raise PackageError(
            f"package {card.name}: the card says {card.architecture} with {n_types} classes, the tensors are "
            f"hovernet-{arch.form}'s with {arch.n_types or 2}"
        )
    if card.tile_in % 8 != arch.excess or card.tile_in - arch.shrink < card.tile_out:
        raise PackageError(
            f"package {card.name}: {card.architecture} cannot keep {card.tile_out} of {card.tile_in} pixels; "
            f"it keeps {arch.tile[1]} of {arch.tile[0]}"
        )
    return build_teacher(arch)


def save_package(path: Path, network: nn.Module, card: Card, *, half: bool = True) -> None:
    """Write a package with the weights of `network` and `card` to `path`, atomically; an existing file is replaced.

    In the file, the card's `weights_sha256` is that of the stored weights. `half`: store floating-point weights as
    float16, for students, whose training ensures that they fit; False to store them unchanged, since the statistics of
    other networks may exceed float16's range. OSError if the file cannot be written.
    """
    import torch

    tensors = {
        name: (t.to(torch.float16) if half and t.is_floating_point() else t).contiguous().cpu()
        for name, t in network.state_dict().items()
    }
    _write(path, tensors, replace(card, weights_sha256=tensors_sha256(tensors)))


def save_with_card(package: Package, card: Card, path: Path) -> None:
    """Write a copy of `package` with the card `card` to `path`, atomically. The weights are unchanged.

    `path` may be that of the package. PackageError if its weights cannot be read or do not match its own card, OSError
    if the file cannot be written.
    """
    _write(path, load_tensors(package), replace(card, weights_sha256=package.card.weights_sha256))


def _write(path: Path, tensors: Mapping[str, torch.Tensor], card: Card) -> None:
    from safetensors.torch import save

    # safetensors' save_file makes files unreadable for others, and reports a full disk as a fault of the tensors.
    write_atomically(path, save(dict(tensors), metadata={CARD_KEY: json.dumps(card.to_json(), sort_keys=True)}))


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the hex SHA-256 of names, dtypes, shapes and bytes of tensors on the CPU, sorted by name.

    TypeError for a dtype that numpy lacks, such as bfloat16.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()

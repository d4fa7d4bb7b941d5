"""Model packages: weights as safetensors with the card inside, so that one file says all that a run needs to know.

The card is JSON under the key `hover_batch` of the file's metadata. Reading it needs no torch; nothing here unpickles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hover_batch.cohort.durable import write_atomically
from hover_batch.errors import PackageError
from hover_batch.model.heads import MapLayout
from hover_batch.taxonomy import Taxonomy

if TYPE_CHECKING:
    import torch
    from torch import nn

CARD_KEY = "hover_batch"
FORMAT = 1
ARCHITECTURES = ("unet", "hovernet-fast", "hovernet-original")
STARTER = Path(__file__).parent.parent / "assets" / "starter.safetensors"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a model is, what it saw and how well it did.

    `tile_in`, `tile_out`: sides in pixels of what goes into the network and of what is kept of its output, the margin
    being cropped. `sobel`: the four constants of `hover_batch.nuclei.watershed.SobelConstants` by name.
    `weights_sha256`: over names, dtypes, shapes and bytes of all tensors.
    """

    name: str
    architecture: str
    encoder: str
    taxonomy: Taxonomy
    mpp: float
    tile_in: int
    tile_out: int
    sobel: Mapping[str, float]
    licence: str
    input_scaling: str = "RGB / 255"
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""

    def __post_init__(self) -> None:
        margin = self.tile_in - self.tile_out
        if margin < 0 or margin % 2 or self.tile_out < 32:
            raise PackageError(f"package {self.name}: tile_in {self.tile_in} and tile_out {self.tile_out} do not fit")

    @property
    def margin(self) -> int:
        return (self.tile_in - self.tile_out) // 2

    @property
    def layout(self) -> MapLayout:
        return MapLayout(len(self.taxonomy.classes))

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "taxonomy": self.taxonomy.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Card:
        values = dict(data)
        if values.pop("format", None) != FORMAT:
            raise PackageError("the package was written by another version of hover-batch; export it anew")
        values["taxonomy"] = Taxonomy.from_json(values["taxonomy"])
        for name in ("training", "metrics"):
            if not isinstance(values.get(name, {}), Mapping):
                raise TypeError(f"{name} is no object")
        return cls(**values)


@dataclass(frozen=True)
class Package:
    """A package on disk: its file, its card, and the sha256 of the whole file, which identifies it in a run."""

    path: Path
    card: Card
    sha256: str


def find_package(name_or_path: str, said: str = "--model") -> Package:
    """The package that a user names: `starter`, a .safetensors file, or a folder with one such file.

    `said`: what it is called where the user named it; messages begin with it.

    Raises PackageError where there is none, or it has no card.
    """
    path = STARTER if name_or_path == "starter" else Path(name_or_path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise PackageError(f"{said} {path}: the folder holds {len(found)} .safetensors files, not one")
        path = found[0]
    if not path.is_file():
        raise PackageError(f"{said} {name_or_path}: no such package; give `starter` or the path of a .safetensors file")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as f:
            metadata = f.metadata() or {}
    except SafetensorError as error:
        raise PackageError(
            f"{said} {path}: not a safetensors file ({error}); `hover-batch models import` turns published "
            "checkpoints into packages"
        ) from error
    if CARD_KEY not in metadata:
        raise PackageError(
            f"{said} {path}: no hover-batch card inside; make one with `hover-batch kd package` or `models import`"
        )
    try:
        card = Card.from_json(json.loads(metadata[CARD_KEY]))
    except (ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{said} {path}: the card inside cannot be read ({error})") from error
    with path.open("rb") as whole:
        return Package(path, card, hashlib.file_digest(whole, "sha256").hexdigest())


def load_network(package: Package) -> nn.Module:
    """The network with the package's weights in float32, in evaluation mode.

    Raises PackageError where tensors do not fit the architecture or do not match the card's hash.
    """
    from safetensors.torch import load_file

    card = package.card
    tensors = load_file(package.path)
    if card.weights_sha256 != tensors_sha256(tensors):
        raise PackageError(f"package {package.path}: the weights do not match their card; fetch the file again")
    network = _build(card, tensors)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise PackageError(f"package {package.path}: {str(error).splitlines()[0]}") from error
    return network.eval().requires_grad_(False)


def _build(card: Card, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The card's network with random weights; of a HoVerNet the tensors tell whether it has a type branch."""
    from hover_batch.model.student import StudentArch, build_student
    from hover_batch.model.teacher import arch_of, build_teacher

    n_types = len(card.taxonomy.classes)
    if card.architecture == "unet":
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
    """Write weights and card to `path`, whole or not at all.

    `half`: floating weights as float16, for students, whose training sees to it that they bear it; else as they are,
    since the statistics of a network from elsewhere may lie beyond float16's range.
    """
    import dataclasses

    import torch

    tensors = {
        name: (t.to(torch.float16) if half and t.is_floating_point() else t).contiguous().cpu()
        for name, t in network.state_dict().items()
    }
    _write(path, tensors, dataclasses.replace(card, weights_sha256=tensors_sha256(tensors)))


def with_card(package: Package, card: Card, path: Path) -> None:
    """Write the weights of `package`, as they are, with another card to `path`, whole or not at all.

    Raises PackageError where the weights do not match the package's own card.
    """
    import dataclasses

    from safetensors.torch import load_file

    tensors = load_file(package.path)
    if package.card.weights_sha256 != tensors_sha256(tensors):
        raise PackageError(f"package {package.path}: the weights do not match their card; fetch the file again")
    _write(path, tensors, dataclasses.replace(card, weights_sha256=package.card.weights_sha256))


def _write(path: Path, tensors: Mapping[str, torch.Tensor], card: Card) -> None:
    from safetensors.torch import save

    # Not by safetensors' own file: others may not read it, and of a full disk it tells as of a fault of the tensors.
    write_atomically(path, save(dict(tensors), metadata={CARD_KEY: json.dumps(card.to_json(), sort_keys=True)}))


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash of the names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()

"""Model packages: safetensors files with the model card inside, so that one file is enough for a run.

The card is JSON under the key `hover_batch` of the file's metadata. Reading it needs no torch; nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hover_batch.errors import PackageError
from hover_batch.files import write_atomically
from hover_batch.model.architectures import architecture
from hover_batch.model.cache import INSTALLED, cached_package, is_package_name
from hover_batch.model.card import Card

if TYPE_CHECKING:
    import torch
    from torch import nn

CARD_KEY = "hover_batch"
ASSETS = Path(__file__).parent.parent / "assets"
STARTER = ASSETS / "starter.safetensors"


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
    """Find the package `name_or_path` and read its card. The weights are not loaded.

    `name_or_path`: `starter`, `starter-open`, the path of a .safetensors file or of a folder with one such file, or the
    name of a package in the cache. An existing path takes precedence over a name in the cache. `option`: option or
    argument by which the user named it, for messages.

    PackageError if the name is empty, there is no such package, it cannot be read, or it has no valid card.
    """
    if not name_or_path.strip():
        raise PackageError(f"{option}: is empty; give the name or path of a model, such as starter")
    path = ASSETS / f"{name_or_path}.safetensors" if name_or_path in INSTALLED else Path(name_or_path)
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
            f"{option} {named}: no such package; give `starter`, `starter-open`, the path of a .safetensors file, or a "
            "name that `hover-batch models list` shows (`models import NAME` downloads published ones)"
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

    PackageError if the architecture is not known, or the weights cannot be read, do not match the card's hash, are not
    finite, or do not fit the card. ImportError if the network is an OpenVINO model and OpenVINO is not installed.
    """
    tensors = load_tensors(package)
    if broken := not_finite(tensors):
        # The network would find no nuclei, as if there were none.
        raise PackageError(
            f"package {package.path}: {broken} holds values that are not finite; export or download it again"
        )
    card, kind = package.card, architecture(package.card.architecture)
    if card.system != kind.system:
        raise PackageError(
            f"package {package.path}: the card says system {card.system}, but that of {kind.name} is {kind.system}"
        )
    try:
        network = kind.build(card, tensors)
        if odd := not_floating(network, tensors):
            raise ValueError(f"{odd}, not floating-point weights")
        network.load_state_dict(tensors)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
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


def not_floating(network: nn.Module, tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name and dtype of the first tensor that has none of torch's usual floating-point dtypes, but stands
    for floating-point weights of `network`; None if there is none. torch would convert it without a word.
    """
    import torch

    usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    wanted = [n for n, t in network.state_dict().items() if t.is_floating_point() and n in tensors]
    return next((f"{n} holds {tensors[n].dtype} values" for n in wanted if tensors[n].dtype not in usual), None)


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first of the tensors with a value that is NaN or infinite, or None if there is none."""
    # torch cannot compare floats of 8 bits, nor quantized values; `not_floating` refuses them.
    comparable = ((n, t) for n, t in tensors.items() if t.is_floating_point() and t.element_size() > 1)
    return next((name for name, t in comparable if not t.isfinite().all()), None)


def save_package(path: Path, network: nn.Module, card: Card, *, half: bool = True) -> None:
    """Write a package with the weights of `network` and `card` to `path`, atomically; an existing file is replaced.

    In the file, the card's `weights_sha256` is the hash of the stored weights.

    `half`: store floating-point weights as float16, for students, whose training ensures that they fit; False to store
    them unchanged, since the statistics of other networks may exceed float16's range.

    OSError if the file cannot be written, TypeError for weights of a dtype that numpy lacks.
    """
    import torch

    tensors = {
        name: (t.to(torch.float16) if half and t.is_floating_point() else t).contiguous().cpu()
        for name, t in network.state_dict().items()
    }
    _write(path, tensors, replace(card, weights_sha256=tensors_sha256(tensors)))


def save_with_card(package: Package, card: Card, path: Path) -> None:
    """Write a copy of `package` with the card `card` to `path`, atomically. The weights and their hash are unchanged.

    `path` may be the file of the package itself; an existing file is replaced. PackageError if the package's weights
    cannot be read or do not match its own card, OSError if the file cannot be written.
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

"""Convert published checkpoints to a network and its card.

Only tensors are read (`torch.load(weights_only=True)`); no code in a checkpoint is run. Tensor names and shapes
determine the architecture, its variant and the number of classes (see `hover_batch.model.architectures`). The names of
the classes are those in `hover_batch.model.published`.
"""

from __future__ import annotations

import pickle
import struct
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hover_batch.errors import PackageError
from hover_batch.files import sha256_file
from hover_batch.model.architectures import architectures
from hover_batch.model.architectures.protocol import Architecture, Recognised
from hover_batch.model.card import Card
from hover_batch.model.fetch import fetched
from hover_batch.model.package import find_package, not_finite, not_floating
from hover_batch.model.published import KINDS

DAMAGED = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OverflowError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
)
"""Exceptions that torch.load(weights_only=True) raises for other files and corrupted checkpoints."""


def load_plain(path: Path) -> Any:
    """Return the content of a file that torch.save wrote, with all tensors on the CPU.

    Only tensors and plain values are unpickled. Exceptions of DAMAGED if it holds anything else, or is corrupted;
    OSError if it cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of other pickle protocols and of sparse tensors
        return torch.load(path, map_location="cpu", weights_only=True)


def read_checkpoint(source: str, kind: str | None = None, sha256: str | None = None) -> tuple[nn.Module, Card]:
    """Read a published checkpoint. Return its network, in evaluation mode on the CPU, and a card for it.

    The network needs no gradients, and the card has the Sobel constants of the starter. A download is cached.

    `source`: path of a file, a URL, or the name of one of tiatoolbox's models; an existing path takes precedence over a
    name. `kind`: a key of KINDS; by default the source's name if it is one, or else the first kind that matches the
    shapes of the tensors. `sha256`: expected SHA-256 of the file in hex. If None, only a download is checked, against
    its recorded hash.

    PackageError if the file cannot be downloaded or read, its hash differs, or it is not a checkpoint of a known kind.
    OSError if the disk is full.
    """
    if kind is not None and kind not in KINDS:
        raise PackageError(f"--kind {kind}: not known; known are {', '.join(KINDS)}")
    is_name = source in KINDS and not Path(source).exists()
    path = fetched(source, sha256) if is_name or "://" in source else Path(source)
    try:
        file_sha256 = sha256_file(path) if path.is_file() else None
    except OSError as error:
        raise PackageError(f"{path}: cannot be read ({error.strerror}); make the file readable") from error
    if file_sha256 is None:
        names = ", ".join(name for name, k in KINDS.items() if k.by_name)
        raise PackageError(f"{source}: no such file; give a checkpoint, or one of the names {names}")
    if sha256 is not None and file_sha256 != sha256.lower():
        raise PackageError(f"{path}: its sha256 is {file_sha256}, not {sha256}; remove the file and download it again")
    weights, record = _tensors(path)
    architecture, found = _recognised(weights, record, path)
    name = _kind(architecture, found, path, kind or (source if is_name else None))
    training = {
        "seen": KINDS[name].seen,
        "source": {"file": path.name, "sha256": file_sha256},
        "recognised": "by the name given" if kind or is_name else "by the tensors' names and shapes",
    }
    card = replace(card_of(name, architecture), encoder=found.encoder, training=training)
    network = architecture.build(card, weights)
    if odd := not_floating(network, weights):
        raise PackageError(f"{path}: {odd}, not floating-point weights; save the network's state dict as float32")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        problems = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise PackageError(f"{path}: not {name}'s weights: {problems[:300]}") from error
    return network.eval().requires_grad_(False), card


def card_of(name: str, architecture: Architecture) -> Card:
    """Return a card for a published model, with the Sobel constants of the starter.

    `name`: key of KINDS. `architecture`: architecture of the network. KeyError if the name is not known, PackageError
    if the starter cannot be read.
    """
    kind = KINDS[name]
    tile_in, tile_out = architecture.tile
    return Card(
        name=name,
        architecture=architecture.name,
        encoder=kind.encoders[0],
        taxonomy=kind.taxonomy,
        mpp=kind.mpp,
        tile_in=tile_in,
        tile_out=tile_out,
        sobel=find_package("starter").card.sobel,
        licence=kind.licence,
        metrics={"calibration": "none for this model: the Sobel constants are the starter's"},
    )


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the tensor has a value of its own for each element, so that it takes no more memory than in the
    file."""
    plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
    return plain and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the state dict of a checkpoint, and everything else in it.

    The state dict is bare, or under `desc` (hover_net) or `model_state_dict` (HoVer-UNet, NuLite, CellViT).
    """
    if path.suffix == ".safetensors":
        raise PackageError(f"{path}: is already a .safetensors file; published checkpoints are .tar and .pth files")
    try:
        content = load_plain(path)
    except pickle.UnpicklingError as error:
        raise PackageError(
            f"{path}: is corrupted, or holds more than tensors, which is not unpickled for safety; download it again, "
            "or if you trust the file, save only its state dict: torch.save(state_dict, path)"
        ) from error
    except DAMAGED as error:
        raise PackageError(f"{path}: not a torch checkpoint, or a corrupted one; download it again") from error
    record: Mapping[str, Any] = {}
    for key in ("desc", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            record, content = content, content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise PackageError(
            f"{path}: holds no state dict; expected tensors by name, bare or under `desc` or `model_state_dict`"
        )
    weights = {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
    if odd := [n for n, t in weights.items() if not _is_dense(t)]:
        raise PackageError(f"{path}: {odd[0]} is not a dense tensor with values; save it as one")
    if broken := not_finite(weights):
        raise PackageError(f"{path}: {broken} is not finite; the training diverged, or the file is corrupted")
    return weights, record


def _recognised(
    weights: Mapping[str, Tensor], record: Mapping[str, Any], path: Path
) -> tuple[Architecture, Recognised]:
    """Return the architecture of a checkpoint's state dict, and what is recognised of it."""
    known = architectures()
    for architecture in known:
        try:
            if found := architecture.recognise(weights, record):
                return architecture, found
        except PackageError as error:
            raise PackageError(f"{path}: {error}") from error
        except (LookupError, ValueError, RuntimeError, TypeError, ArithmeticError) as error:
            raise PackageError(
                f"{path}: a part of the {architecture.name} network is missing or has the wrong shape ({error}); "
                "download it again"
            ) from error
    names = ", ".join(architecture.name for architecture in known)
    raise PackageError(f"{path}: its tensors are of none of the known architectures: {names}")


def _kind(architecture: Architecture, found: Recognised, path: Path, given: str | None) -> str:
    """Return the `given` kind if it fits, or the first that does. PackageError if none fits."""
    fitting = [
        name
        for name, kind in KINDS.items()
        if (kind.architecture, kind.types) == (architecture.name, found.types) and found.encoder in kind.encoders
    ]
    described = f"{architecture.name} {found.encoder}".rstrip() + f" with {found.types} type channels"
    if given is not None and given not in fitting:
        raise PackageError(f"{path}: not {given}: it holds {described}; matching kinds: {', '.join(fitting) or 'none'}")
    if not fitting:
        raise PackageError(
            f"{path}: {described} is none of the published models, whose classes are known: {', '.join(KINDS)}"
        )
    return given or fitting[0]

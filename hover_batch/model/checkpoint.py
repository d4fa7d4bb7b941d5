"""Convert published checkpoints to a network and its card: hover_net's .tar, tiatoolbox's and HoVer-UNet's .pth.

Only tensors are read (`torch.load(weights_only=True)`); no code in a checkpoint is run. Tensor names and shapes
determine HoVerNet's form, HoVer-UNet's encoder and the number of classes. The names of the classes are those in
`hover_batch.model.published`.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from hover_batch.errors import PackageError
from hover_batch.files import sha256_file
from hover_batch.model.fetch import fetched
from hover_batch.model.package import Card, find_package
from hover_batch.model.published import KINDS, MPP
from hover_batch.model.student import StudentArch, build_student
from hover_batch.model.teacher import TeacherArch, arch_of, build_teacher

_DAMAGED = (
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
)
"""Exceptions that torch.load raises for other files and corrupted checkpoints."""


def read_checkpoint(source: str, kind: str | None = None, sha256: str | None = None) -> tuple[nn.Module, Card]:
    """Return the network in a checkpoint, in evaluation mode, and a card with the Sobel constants of the starter.

    `source`: a file, a URL, or the name of one of tiatoolbox's models; a file takes precedence over a name. `kind`: a
    key of KINDS; by default the source's name, or else the first kind that matches the shapes. `sha256`: expected hex
    SHA-256 of the file. A download is cached. PackageError if the file cannot be downloaded, its hash differs, or it
    cannot be read, or is not a checkpoint of a known kind. OSError if the disk is full.
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
    weights = _tensors(path)
    network, architecture, encoder, n_types = _network(weights, path)
    name = _kind(architecture, n_types, path, kind or (source if is_name else None))
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        problems = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise PackageError(f"{path}: not {name}'s weights: {problems[:300]}") from error
    published = KINDS[name]
    card = Card(
        name=name,
        architecture=architecture,
        encoder=encoder,
        taxonomy=published.taxonomy,
        mpp=MPP,
        tile_in=320 if architecture == "unet" else arch_of(weights).tile[0],
        tile_out=256,
        sobel=find_package("starter").card.sobel,
        licence=published.licence,
        training={
            "seen": published.seen,
            "source": {"file": path.name, "sha256": file_sha256},
            "recognised": "by the name given" if kind or is_name else "by the tensors' names and shapes",
        },
        metrics={"calibration": "none for this model: the Sobel constants are the starter's"},
    )
    return network.eval().requires_grad_(False), card


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint: bare, or under `desc` (hover_net) or `model_state_dict` (HoVer-UNet)."""
    if path.suffix == ".safetensors":
        raise PackageError(f"{path}: is already a .safetensors file; published checkpoints are .tar and .pth files")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise PackageError(
            f"{path}: holds more than tensors, which is not unpickled for safety; if you trust the file, save only its "
            "state dict: torch.save(state_dict, path)"
        ) from error
    except _DAMAGED as error:
        raise PackageError(f"{path}: not a torch checkpoint, or a corrupted one; download it again") from error
    for key in ("desc", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(t, Tensor) for t in content.values()):
        raise PackageError(
            f"{path}: holds no state dict; expected tensors by name, bare or under `desc` or `model_state_dict`"
        )
    weights = {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
    if odd := [n for n, t in weights.items() if t.layout is not torch.strided or t.device.type != "cpu"]:
        raise PackageError(f"{path}: {odd[0]} is not a dense tensor with values; save it as one")
    if broken := [n for n, t in weights.items() if t.is_floating_point() and not t.isfinite().all()]:
        raise PackageError(f"{path}: {broken[0]} is not finite; the training diverged, or the file is corrupted")
    return weights


def _network(weights: Mapping[str, Tensor], path: Path) -> tuple[nn.Module, str, str, int]:
    """Build the network that fits, with random weights; return it, architecture, encoder and type channels (or 0)."""
    try:
        if any(name.startswith("decoder.ls.") for name in weights):
            raise PackageError(
                f"{path}: HoVerNet+, which has a layer branch; only HoVerNet and HoVer-UNet can be imported"
            )
        if "decoder.np.u3.conva.weight" in weights:
            teacher: TeacherArch = arch_of(weights)
            return build_teacher(teacher), f"hovernet-{teacher.form}", "", teacher.n_types or 0
        if "encoder.patch_embed1.proj.weight" in weights:
            types = len(weights["segmentation_head.0.bias"]) - 4
            encoder = _encoder(weights)
            return build_student(StudentArch(encoder, types)), "unet", encoder, types
    except (KeyError, IndexError, ValueError, RuntimeError, TypeError) as error:
        raise PackageError(
            f"{path}: a part of the network is missing or has the wrong shape ({error}); download it again"
        ) from error
    raise PackageError(f"{path}: tensors of neither HoVerNet nor HoVer-UNet; other networks cannot be imported")


def _encoder(weights: Mapping[str, Tensor]) -> str:
    """Return the name of the Mix Vision Transformer, by the depth of its third stage and its width."""
    depth = len({name.split(".")[2] for name in weights if name.startswith("encoder.block3.")})
    if depth == 2:
        return "mit_b0" if len(weights["encoder.patch_embed1.proj.weight"]) == 32 else "mit_b1"
    return {6: "mit_b2", 18: "mit_b3", 27: "mit_b4", 40: "mit_b5"}[depth]


def _kind(architecture: str, types: int, path: Path, given: str | None) -> str:
    """Return the `given` kind if it fits, or the first that does. PackageError if none fits."""
    fitting = [name for name, k in KINDS.items() if (k.architecture, k.types) == (architecture, types)]
    found = f"{architecture} with {types} type channels"
    if given is not None and given not in fitting:
        raise PackageError(f"{path}: not {given}: it holds {found}; matching kinds: {', '.join(fitting) or 'none'}")
    if not fitting:
        raise PackageError(
            f"{path}: {found} is none of the published models, whose classes are known: {', '.join(KINDS)}"
        )
    return given or fitting[0]

"""Networks that were exported to ONNX or to OpenVINO's format, with a TOML file that describes input and output.

    name = "my-network"
    licence = "MIT"
    mpp = 0.25                       # µm per pixel of the images
    tile_in = 256                    # pixels of a tile, the network's input
    tile_out = 192                   # central pixels whose output is kept
    input = { mean = [0.5, 0.5, 0.5], std = [0.5, 0.5, 0.5], order = "RGB" }   # in this order, for [0, 1]; optional
    np = { channels = [0, 1] }       # background and nucleus, or only nucleus
    hv = { channels = [2, 3] }       # h (along x) and v (along y)
    tp = { channels = [4, 5, 6], values = "probabilities" }   # background, then the classes; omit it if there are none

    [classes]                        # names and colours, in the order of tp
    tumour = [220, 30, 40]
    lymphocyte = [0, 160, 60]

A branch may also have `output`, the name of the network's output that contains it, and `values`: "logits" (the default)
or "probabilities".

The network is converted once, together with the scaling of the input and the choice of channels, and the package stores
the two files of OpenVINO's format as bytes. Such a network runs on the CPU only. The .pt2 files of torch.export are not
read, because torch unpickles parts of them (torch 2.12, `torch.load(weights_only=False)` in torch/export/pt2_archive),
so that a file could run code.
"""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hover_batch.errors import PackageError
from hover_batch.model.architectures.protocol import Architecture
from hover_batch.model.card import Card
from hover_batch.model.heads import Heads
from hover_batch.model.openvino import StoredNetwork, as_package_error, core

SUFFIXES = (".onnx", ".xml")
"""Suffixes of the files that can be imported: ONNX, and OpenVINO's format, whose .bin must be in the same folder."""
LEAST = 1e-6
"""Smallest probability; smaller ones are set to it before the logarithm is taken."""
_ENTRIES = {"name", "licence", "mpp", "tile_in", "tile_out", "input", "np", "hv", "tp", "classes"}


class Exported(Architecture):
    """Exported network. Its package holds an OpenVINO model as the tensors `xml` and `weights`, uint8."""

    name = "exported"
    patch_side = 0  # it takes tiles only

    def build(self, card: Card, tensors: Mapping[str, Tensor] | None) -> nn.Module:
        """Return the network in `tensors`, whose OpenVINO model is read and checked against the card.

        `card`: card with the classes and tile sizes. `tensors`: the tensors `xml` and `weights`, uint8.

        PackageError if `tensors` is None, they are not an OpenVINO model, or it does not fit the card. KeyError if one
        of the tensors is missing, ImportError if OpenVINO is not installed.
        """
        if tensors is None:
            raise PackageError(f"package {card.name}: an exported network cannot be made without its file")
        network = StoredNetwork(tensors["xml"], tensors["weights"])
        model = network.model()
        taken = (1, 3, card.tile_in, card.tile_in)
        shapes = [tuple(port.shape) if port.partial_shape.is_static else () for port in (*model.inputs, *model.outputs)]
        channels = Heads(len(card.taxonomy.classes)).channels
        if len(shapes) != 2 or shapes[0] != taken or len(shapes[1]) != 4 or shapes[1][:2] != (1, channels):
            raise PackageError(f"package {card.name}: its network maps {shapes}, not {taken} to {channels} channels")
        height, width = shapes[1][2:]
        if height != width or height > card.tile_in or height < card.tile_out or (height - card.tile_out) % 2:
            raise PackageError(
                f"package {card.name}: the network gives {height} × {width} of {card.tile_in} pixels, of which the "
                f"central {card.tile_out} cannot be kept; correct tile_in and tile_out"
            )
        return network


ARCHITECTURES = (Exported(),)


def read_exported(path: Path, toml: Path, sobel: Mapping[str, float]) -> tuple[nn.Module, Card]:
    """Return the network in an exported file, in evaluation mode, and the card that its TOML file describes.

    The TOML file has the entries mpp, tile_in, tile_out, np, hv and classes, and optionally name, licence, input and tp
    (see the module's docstring). Without an entry `name`, the name on the card is the name of the TOML file without its
    suffix.

    `path`: ONNX or .xml file; the .bin file of an .xml file must be in the same folder. `toml`: TOML file. `sobel`:
    Sobel constants for the card, by name (see `Card.sobel`).

    PackageError if a file cannot be read, or the TOML file is incomplete or contradicts the network. ImportError if
    OpenVINO is not installed.
    """
    try:
        said = tomllib.loads(toml.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PackageError(f"--channels {toml}: cannot be read ({error})") from error
    try:
        card = _card(said, toml.stem, sobel)
        with TemporaryDirectory() as folder:
            network = StoredNetwork(*_stored(_adapted(_model(path, Path(folder), card.tile_in), said, card), folder))
        Exported().build(card, network.state_dict())
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise PackageError(f"--channels {toml}: {str(error)[:200]}; see hover-batch models import --help") from error
    return network.eval(), card


def _card(said: Mapping[str, Any], name: str, sobel: Mapping[str, float]) -> Card:
    if unknown := sorted(said.keys() - _ENTRIES):
        raise ValueError(f"unknown entry {unknown[0]!a}; known are {', '.join(sorted(_ENTRIES))}")
    if missing := [entry for entry in ("mpp", "tile_in", "tile_out", "np", "hv", "classes") if entry not in said]:
        raise ValueError(f"{missing[0]} is missing")
    colors = {"background": [255, 255, 255]} | said["classes"]
    classes = [{"id": i, "name": label, "color": color} for i, (label, color) in enumerate(colors.items())]
    values = {
        "format": 1,
        "name": said.get("name", name),
        "architecture": Exported.name,
        "encoder": "",
        "taxonomy": {"name": said.get("name", name), "classes": classes},
        "sobel": dict(sobel),
        "licence": said.get("licence", "not stated"),
        "training": {"channels": {entry: said[entry] for entry in ("input", "np", "hv", "tp") if entry in said}},
        "metrics": {"calibration": "none for this model: the Sobel constants are the starter's"},
    }
    return Card.from_json(values | {entry: said[entry] for entry in ("mpp", "tile_in", "tile_out")})


def _model(path: Path, folder: Path, side: int) -> Any:
    """Read a file as an openvino.Model with the input (1, 3, side, side).

    The file is copied to the empty `folder` first, so that it cannot refer to other files in its own folder.
    """
    try:
        copy = Path(shutil.copyfile(path, folder / f"network{path.suffix}"))
        if path.suffix == ".xml":
            shutil.copyfile(path.with_suffix(".bin"), copy.with_suffix(".bin"))
    except OSError as error:
        raise PackageError(f"{path}: cannot be read ({error.strerror}: {error.filename})") from error
    try:
        model = core().read_model(copy)
        model.reshape([1, 3, side, side])
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise PackageError(
            f"{path}: OpenVINO cannot read it as a network of one image (1, 3, {side}, {side}) ({reason}); export it "
            "with the weights inside the file, and with free or these sides"
        ) from error
    return model


def _adapted(model: Any, said: Mapping[str, Any], card: Card) -> Any:
    """Return the model with RGB in [0, 1] as its input and the channels of `heads` as its only output."""
    import openvino
    from openvino import opset13 as ops

    steps = openvino.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(openvino.Type.f32).set_layout(openvino.Layout("NCHW"))
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    scaling = {"mean": [0.0] * 3, "std": [1.0] * 3, "order": "RGB"} | said.get("input", {})
    numbers = [len(scaling["mean"]), len(scaling["std"])] == [3, 3] and min(scaling["std"]) > 0
    if len(scaling) != 3 or scaling["order"] not in ("RGB", "BGR") or not numbers:
        raise ValueError('input takes mean, std (each three numbers) and order ("RGB" or "BGR")')
    if not all(0 <= number <= 1 for number in (*scaling["mean"], *scaling["std"])):  # 255 would make all images black
        raise ValueError(
            "input has mean or std above 1 or below 0, but images have values in [0, 1]; divide them by 255"
        )
    if scaling["order"] == "BGR":
        steps.input().preprocess().reverse_channels()
    steps.input().preprocess().mean(list(map(float, scaling["mean"]))).scale(list(map(float, scaling["std"])))
    with as_package_error():
        model = steps.build()

    def branch(name: str, counts: tuple[int, ...]) -> Any:
        entry = said[name]
        if not isinstance(entry, Mapping) or not entry.keys() <= {"channels", "output", "values"}:
            raise ValueError(f"{name} takes channels, output and values")
        channels, values = entry["channels"], entry.get("values", "logits")
        if not isinstance(channels, list) or len(channels) not in counts or len({*channels}) != len(channels):
            raise ValueError(f"{name}.channels is {channels}, not {' or '.join(map(str, counts))} different channels")
        if values not in ("logits", "probabilities") or (name == "hv" and "values" in entry):
            raise ValueError(f'{name}.values is {values!a}, not "logits" or "probabilities" (np and tp only)')
        maps = _output(model, entry.get("output"))
        if not all(type(channel) is int and 0 <= channel < maps.get_shape()[1] for channel in channels):
            raise ValueError(f"{name}.channels is {channels}; the network's output has {maps.get_shape()[1]} channels")
        picked = ops.gather(maps, np.array(channels), np.int64(1))
        if len(channels) == 1 and values == "probabilities":
            picked = ops.concat([ops.subtract(np.float32(1), picked), picked], 1)
        if values == "probabilities":
            return ops.log(ops.clamp(picked, LEAST, 1.0))
        return ops.concat([ops.subtract(picked, picked), picked], 1) if len(channels) == 1 else picked

    n_types = len(card.taxonomy.classes)
    nuclei = branch("np", (1, 2))
    types = branch("tp", (n_types,)) if "tp" in said else nuclei
    if "tp" not in said and n_types != 2:
        raise ValueError("tp is missing, but there are several classes")
    return openvino.Model([ops.concat([nuclei, branch("hv", (2,)), types], 1)], model.get_parameters())


def _output(model: Any, name: str | None) -> Any:
    """Return the output `name` of a model, or its only one."""
    named = {port_name: port for port in model.outputs for port_name in port.names}
    if name is None and len(model.outputs) != 1:
        raise ValueError(f"the network has the outputs {', '.join(sorted(named))}; name the output of each branch")
    if name is not None and name not in named:
        raise ValueError(f"the network has no output {name!a}; it has {', '.join(sorted(named))}")
    port = model.outputs[0] if name is None else named[name]
    if not port.partial_shape.is_static or len(port.shape) != 4:
        raise ValueError(f"the output {port.any_name if port.names else 0} is not of the form (1, channels, y, x)")
    return port.get_node().input_value(0)


def _stored(model: Any, folder: str) -> tuple[Tensor, Tensor]:
    """Return the two files of a model as tensors (n) uint8."""
    import openvino

    path = Path(folder) / "stored.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    xml, weights = (np.frombuffer(p.read_bytes(), np.uint8) for p in (path, path.with_suffix(".bin")))
    return torch.from_numpy(xml.copy()), torch.from_numpy(weights.copy())

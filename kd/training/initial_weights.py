"""What training starts from: a network with random weights, with ImageNet's in its encoder, or a package's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hover_batch.errors import InputError
from hover_batch.model.package import find_package, load_network
from hover_batch.model.student import StudentArch, build_student
from hover_batch.model.teacher import Form, HoVerNet, TeacherArch, build_teacher
from hover_batch.taxonomy import Taxonomy
from kd.training.config import TrainConfig
from kd.training.efficientnet_lite import PACKAGES, imagenet_weights


def build_network(settings: Mapping[str, Any], n_types: int) -> nn.Module:
    """The network of a configuration (`TrainConfig.to_json`) with random weights."""
    if settings["model"] == "unet":
        return _build_student(settings["encoder"], n_types)
    form: Form = "fast" if settings["model"] == "hovernet-fast" else "original"
    return build_teacher(TeacherArch(form, n_types, settings["width"]))


def cut_of(network: nn.Module) -> int:
    """By how many pixels the output is narrower than the input on each side."""
    return network.arch.shrink // 2 if isinstance(network, HoVerNet) else 0


def starting_network(config: TrainConfig, taxonomy: Taxonomy) -> tuple[nn.Module, dict[str, Any]]:
    """The network that training begins with, and what its card says of the training, or the source, of its weights.

    Raises InputError where weights cannot be had, or do not fit.
    """
    network = build_network(config.to_json(), len(taxonomy.classes))
    if config.init is not None:
        return network, _load_package(config.init, config, taxonomy, network)
    if config.model == "unet" and config.encoder_weights != "random":
        before: dict[str, Any] = {}
        if config.encoder_weights != "imagenet":
            weights = _read(Path(config.encoder_weights))
        elif config.encoder in PACKAGES:
            weights, before["encoder"] = imagenet_weights(config.encoder)
        else:
            weights = _imagenet(config.encoder)
        _load_encoder(network.encoder, weights, config.encoder_weights)  # type: ignore[arg-type]  # smp.Unet's
        return network, before
    return network, {}


def _build_student(encoder: str, n_types: int) -> nn.Module:
    try:
        network = build_student(StudentArch(encoder, n_types))
        with torch.inference_mode():
            side = network.eval()(torch.zeros(1, 3, 64, 96)).shape[2:]
    except (KeyError, ValueError, RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = str(error).strip("\"'").split(", supported", 1)[0].splitlines()[0][:200]
        raise InputError(
            f"--encoder {encoder}: no encoder of five stages for a U-Net ({reason}); "
            "mit_b0 … mit_b3 are, and of timm those that halve the side five times, as tu-resnet18"
        ) from error
    if side != (64, 96):
        raise InputError(f"--encoder {encoder}: gives {tuple(side)} pixels of 64 × 96; take one that halves five times")
    return network.train()


def _load_package(init: Path, config: TrainConfig, taxonomy: Taxonomy, network: nn.Module) -> dict[str, Any]:
    package = find_package(str(init), "--init")
    card = package.card
    encoder = config.encoder if config.model == "unet" else ""
    if (card.architecture, card.encoder, card.taxonomy.classes) != (config.model, encoder, taxonomy.classes):
        raise InputError(f"--init {init}: its network or classes are others than those to be trained")
    try:
        network.load_state_dict(load_network(package).state_dict())
    except RuntimeError as error:
        raise InputError(f"--init {init}: {str(error).splitlines()[1].strip()[:200]}") from error
    return dict(card.training)


def _imagenet(encoder: str) -> Mapping[str, Tensor]:
    """Through segmentation-models-pytorch, which keeps what it has fetched."""
    import segmentation_models_pytorch as smp

    try:
        weights: Mapping[str, Tensor] = smp.encoders.get_encoder(encoder, depth=5, weights="imagenet").state_dict()
    except Exception as error:  # whatever the hub's client and the network raise
        first: BaseException = error
        while first.__context__ is not None:  # what went wrong before the client's retries did
            first = first.__context__
        reason = (str(first).strip() or type(first).__name__).splitlines()[0][:200]
        raise InputError(
            f"--encoder-weights imagenet: those of {encoder} cannot be fetched ({reason}); give a file of the "
            "encoder's weights (.safetensors, or .pth with a state dict) fetched elsewhere, or `random`"
        ) from error
    return weights


def _read(path: Path) -> Mapping[str, Tensor]:
    """A state dict, bare or under `state_dict` or `model`. Unpickles nothing but tensors."""
    if not path.is_file():
        raise InputError(f"--encoder-weights {path}: no such file; give one, or `imagenet`, or `random`")
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        held = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"--encoder-weights {path}: not a .safetensors file, nor a .pth of tensors alone "
            f"({str(error).splitlines()[0][:120] if str(error) else type(error).__name__})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not all(isinstance(t, Tensor) for t in held.values()):
        raise InputError(f"--encoder-weights {path}: holds no state dict, which is tensors by name")
    return held


def _load_encoder(encoder: nn.Module, weights: Mapping[str, Tensor], given: str) -> None:
    """Every tensor of the encoder, found by its name, with or without the prefix that a whole network or a wrapper
    gives it; what a file holds besides, such as a classifier, is left."""

    def bare(name: str) -> str:
        return name.removeprefix("encoder.").removeprefix("model.")

    found = {bare(name): tensor for name, tensor in weights.items()}
    wanted = {n: t for n, t in encoder.state_dict().items() if not n.endswith("num_batches_tracked")}
    missing = [f"{n} (missing)" for n in wanted if bare(n) not in found]
    misfit = [
        f"{n} ({tuple(found[bare(n)].shape)}, not {tuple(t.shape)})"
        for n, t in wanted.items()
        if bare(n) in found and found[bare(n)].shape != t.shape
    ]
    if faults := missing + misfit:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(
            f"--encoder-weights {given}: {len(faults)} of the encoder's {len(wanted)} tensors do not fit: "
            f"{', '.join(faults[:3])}{more}; give the weights of this --encoder"
        )
    # Not the encoder's own load_state_dict, which in some of smp's encoders changes the dict that it is given.
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if name in wanted:
                tensor.copy_(found[bare(name)])

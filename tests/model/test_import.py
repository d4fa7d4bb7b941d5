"""Checkpoints in the published formats, with few channels, become packages with the same outputs."""

from __future__ import annotations

import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from random_weights import randomise
from torch import nn
from typer.testing import CliRunner, Result

from hover_batch.cli import app
from hover_batch.errors import PackageError
from hover_batch.model.architectures.hovernet import Form, TeacherArch, build_teacher
from hover_batch.model.checkpoint import read_checkpoint
from hover_batch.model.package import find_package, load_network, save_package
from hover_batch.taxonomy import CONSEP, MONUSAC, NUCLEI, PANNUKE, Taxonomy
from kd.evaluation.calibrate import CUTS

STARTER = find_package("starter").card


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def teacher(form: Form, n_types: int | None) -> nn.Module:
    return randomise(build_teacher(TeacherArch(form, n_types, width=8)))


def tar(path: Path, network: nn.Module) -> Path:
    """Save a checkpoint in hover_net's format for several GPUs."""
    torch.save({"desc": {f"module.{k}": v for k, v in network.state_dict().items()}}, path)
    return path


def same(ours: nn.Module, theirs: nn.Module, side: int) -> None:
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize(
    ("form", "n_types", "taxonomy", "name", "tiles"),
    [
        ("fast", 6, PANNUKE, "hovernet_fast-pannuke", (352, 256)),
        ("fast", 5, MONUSAC, "hovernet_fast-monusac", (352, 256)),
        ("original", 5, CONSEP, "hovernet_original-consep", (446, 256)),
        ("original", None, NUCLEI, "hovernet_original-kumar", (446, 256)),
    ],
)
def test_hover_nets_tar_and_tiatoolboxs_pth(
    tmp_path: Path, form: Form, n_types: int | None, taxonomy: Taxonomy, name: str, tiles: tuple[int, int]
) -> None:
    network = teacher(form, n_types)
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    loaded, card = read_checkpoint(str(tmp_path / "bare.pth"))
    unpacked, same_card = read_checkpoint(str(tar(tmp_path / "x.tar", network)))
    assert replace(card, training={}) == replace(same_card, training={})
    assert (card.name, card.taxonomy, (card.tile_in, card.tile_out)) == (name, taxonomy, tiles)
    save_package(tmp_path / "x.safetensors", loaded, card, half=False)
    packaged = load_network(find_package(str(tmp_path / "x.safetensors")))
    for weights in (n.state_dict() for n in (loaded, unpacked, packaged)):
        assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())
    if n_types == 6:  # the others are the same modules with the same weights
        same(packaged, network, 96)


def test_hover_unets_pth(tmp_path: Path) -> None:
    network = randomise(smp.Unet("mit_b2", encoder_weights=None, classes=10))
    saved = {"epoch": 3, "model_state_dict": network.state_dict(), "optimizer_state_dict": {}, "losses": [0.1]}
    torch.save(saved, tmp_path / "unet.pth")
    loaded, card = read_checkpoint(str(tmp_path / "unet.pth"))
    assert (card.name, card.architecture, card.encoder) == ("hover-unet-pannuke", "unet", "mit_b2")
    assert card.taxonomy == PANNUKE
    same(loaded, network, 64)


def test_the_card_and_the_message_name_the_sources(tmp_path: Path) -> None:
    source = tar(tmp_path / "pannuke.tar", teacher("fast", 6))
    result = run("models", "import", source, "-o", tmp_path / "new" / "mine.safetensors")
    assert result.exit_code == 0, result.output
    package = find_package(str(tmp_path / "new"))
    card = package.card
    assert card.name == "mine" and card.sobel == STARTER.sobel and card.mpp == 0.25
    assert "contaminated" in card.training["seen"] and "CC BY-NC-SA" in card.licence
    assert card.training["source"]["file"] == "pannuke.tar"
    digest = card.training["source"]["sha256"]
    for said in (result.output, run("models", "show", package.path).output):
        assert "the starter's" in said and digest in said and "contaminated" in said and "neoplastic" in said
    assert package.sha256 in run("models", "show", package.path, "--json").output
    listed = run("models", "list", tmp_path / "new").output
    assert "starter" in listed and "mine.safetensors" in listed and "hovernet_fast-pannuke" in listed
    # The file's hash can be demanded.
    again = ["models", "import", source, "-o", tmp_path / "again.safetensors", "--sha256"]
    assert run(*again, digest).exit_code == 0
    assert "its sha256 is" in run(*again, "0" * 64).stderr


@pytest.mark.parametrize(("form", "n_types"), [("fast", 6), ("original", None)])
def test_segment_runs_an_imported_package(tmp_path: Path, form: Form, n_types: int | None) -> None:
    network, card = read_checkpoint(str(tar(tmp_path / "x.tar", teacher(form, n_types))))
    save_package(tmp_path / "x.safetensors", network, card, half=False)
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "tile.png")
    (tmp_path / "cohort.csv").write_text("path,mpp\ntile.png,0.25\n")
    flags = ["--model", tmp_path / "x.safetensors", "--tissue", "all", "--batch", "1", "--unit", "256"]
    result = run("segment", tmp_path / "cohort.csv", "-o", tmp_path / "out", *flags)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "slides" / "tile" / "nuclei.parquet").is_file()


def test_calibration_on_annotated_images(data: Path, tmp_path: Path) -> None:
    """A corner of one real validation image; nine scales, of which one is chosen and all are recorded."""
    rows = (data / "nuclei" / "dataset.csv").read_text().splitlines()
    row = next(r for r in rows if r.startswith("consep") and ",val," in r).split(",")
    folder = tmp_path / "nuclei"
    for name in row[1:4]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(data / "nuclei" / name) as picture:
            picture.crop((400, 400, 600, 600)).save(folder / name)
    (folder / "dataset.csv").write_text(f"{rows[0]}\n{','.join(row)}\n")
    source = tar(tmp_path / "x.tar", teacher("fast", 6))
    out = tmp_path / "x.safetensors"
    result = run("models", "import", source, "-o", out, "--calibrate", folder)
    assert result.exit_code == 0, result.output
    card = find_package(str(out)).card
    assert "found on annotated images" in result.output and card.sobel != STARTER.sobel
    assert len(card.metrics["calibration"]["trials"]) == 1 + len(CUTS)
    assert card.metrics["calibration"]["data"]["consep"]["images"] == len(card.metrics["calibration"]["saw"]) == 1
    (folder / "dataset.csv").write_text(f"{rows[0]}\n")
    assert "it lists no image" in run("models", "import", source, "-o", out, "--calibrate", folder).stderr


class _Evil:
    """An object that would run a command when unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.mkdir, ("unpickled",)


def _bad(kind: str, path: Path) -> None:
    network = teacher("fast", 6)
    weights = network.state_dict()
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("<html>404</html>")
        case "noise":
            path.write_bytes(np.random.default_rng(0).bytes(5000))
        case "real tar":
            with tarfile.open(path, "w") as archive:
                archive.add(__file__)
        case "zip":
            shutil.make_archive(str(path.with_suffix("")), "zip", Path(__file__).parent)
            path.with_suffix(".zip").rename(path)
        case "cut off":
            tar(path, network)
            path.write_bytes(path.read_bytes()[:-3000])
        case "pickle":
            torch.save({"desc": weights, "more": _Evil()}, path)
        case "whole module":
            torch.save(network, path)
        case "list":
            torch.save([1, 2], path)
        case "no tensors":
            torch.save({"desc": {"a": 1}}, path)
        case "other network":
            torch.save({"fc.weight": torch.zeros(3)}, path)
        case "layers":
            torch.save({**weights, "decoder.ls.u0.conv.bias": torch.zeros(5)}, path)
        case "seven classes":
            tar(path, teacher("fast", 8))
        case "missing":
            del weights["d2.units.3.conv2.weight"]
            torch.save(weights, path)
        case "shape":
            torch.save({**weights, "d2.units.3.conv2.weight": torch.zeros(3)}, path)
        case "without values":
            torch.save({"desc": {"a": torch.ones(3, device="meta")}}, path)
        case "repeated":
            torch.save({"desc": {"a": torch.ones(1).expand(10**5, 10**5)}}, path)
        case "no size":
            torch.save(
                {n: torch.ones(()) for n in ("encoder.patch_embed1.proj.weight", "segmentation_head.0.bias")}, path
            )
        case "nan":
            torch.save({**weights, "conv_bot.weight": weights["conv_bot.weight"] * float("nan")}, path)
        case "int64" | "complex64" | "float8_e4m3fn" as dtype:
            torch.save({**weights, "conv_bot.weight": weights["conv_bot.weight"].to(getattr(torch, dtype))}, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        *((dtype, f"conv_bot.weight holds torch.{dtype} values") for dtype in ("int64", "complex64", "float8_e4m3fn")),
        ("absent", "no such file"),
        ("empty", "download it again"),
        ("text", "torch.save"),
        ("noise", "torch.save"),
        ("real tar", "download it again"),
        ("zip", "download it again"),
        ("cut off", "download it again"),
        ("pickle", "not unpickled for safety"),
        ("whole module", "not unpickled for safety"),
        ("list", "no state dict"),
        ("no tensors", "no state dict"),
        ("other network", "of none of the known architectures"),
        ("layers", "HoVerNet+"),
        ("seven classes", "none of the published"),
        ("missing", "d2.units.3.conv2.weight"),
        ("shape", "d2.units.3.conv2.weight"),
        ("without values", "not a dense tensor"),
        ("repeated", "not a dense tensor"),
        ("no size", "missing or has the wrong shape"),
        ("nan", "not finite"),
    ],
)
def test_other_files_get_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    _bad(kind, Path("x.pth"))
    result = run("models", "import", "x.pth", "-o", "out.safetensors")
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.output
    assert not Path("out.safetensors").exists() and not Path("unpickled").exists()


def test_invalid_flags_are_refused(tmp_path: Path) -> None:
    source = tar(tmp_path / "x.tar", teacher("fast", 6))
    for flags, message in (
        (["-o", tmp_path / "x.pth"], ".safetensors"),
        (["-o", tmp_path / "x.tar" / "x.safetensors"], "-o"),
        (["-o", tmp_path / "x.safetensors", "--calibrate", tmp_path], "no dataset.csv"),
        (["-o", tmp_path / "x.safetensors", "--kind", "resnet"], "--kind resnet"),
        (["-o", tmp_path / "x.safetensors", "--kind", "hovernet_fast-monusac"], "not hovernet_fast-monusac"),
    ):
        result = run("models", "import", source, *flags)
        assert result.exit_code == 2 and message in result.stderr, result.output
    with pytest.raises(PackageError, match="authors' .pth"):
        read_checkpoint("hover-unet-pannuke")


def test_a_card_that_contradicts_its_tensors_is_refused(tmp_path: Path) -> None:
    network, card = read_checkpoint(str(tar(tmp_path / "x.tar", teacher("fast", 6))))
    for changes, message in (
        ({"architecture": "hovernet-original"}, "the tensors are hovernet-fast"),
        ({"taxonomy": CONSEP}, "with 5 classes"),
        ({"tile_in": 348}, "keeps 256 of 352"),
        ({"architecture": "gan"}, "known are .*unet"),
    ):
        save_package(tmp_path / "x.safetensors", network, replace(card, **changes), half=False)  # type: ignore[arg-type]
        with pytest.raises(PackageError, match=message):
            load_network(find_package(str(tmp_path / "x.safetensors")))


def test_an_import_keeps_values_beyond_float16(tmp_path: Path) -> None:
    """Statistics of other networks may exceed float16's range."""
    network = teacher("fast", 6)
    network.d3.blk_bna.bn.running_var.fill_(1e6)  # type: ignore[union-attr,operator]
    loaded, card = read_checkpoint(str(tar(tmp_path / "x.tar", network)))
    save_package(tmp_path / "x.safetensors", loaded, card, half=False)
    kept = load_network(find_package(str(tmp_path / "x.safetensors"))).state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(kept[name], tensor)

"""`hover-batch models`: list, import, check and describe model packages."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hover_batch.commands.options import local_path
from hover_batch.errors import InputError, PackageError
from hover_batch.files import check_output_file, replacing, sha256_file
from hover_batch.model.cache import (
    INSTALLED,
    cached_downloads,
    cached_package,
    cached_packages,
    check_download,
    download_path,
    is_package_name,
)
from hover_batch.model.card import Card
from hover_batch.model.hub_card import earlier_data, listed_entries, nested
from hover_batch.model.package import Package, find_package, load_tensors, save_package
from hover_batch.model.published import COSTS, KINDS

if TYPE_CHECKING:
    from torch import nn

PackageArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="`starter`, `starter-open`, another name that `models list` shows, a .safetensors file, or a folder that "
        "holds one.",
    ),
]


def import_package(
    source: Annotated[
        str,
        typer.Argument(
            help="Weights: hover_net's .tar, the .pth of tiatoolbox, HoVer-UNet, NuLite or CellViT, a package "
            "(.safetensors), or with --channels an exported network (.onnx). A file, an https URL, or a name that "
            "`models list` shows as importable by name.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The .safetensors file to write.",
            parser=local_path,
            show_default="in the cache, where --model finds it by its name",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help=f"Kind of checkpoint: {', '.join(KINDS)}.", show_default="recognised by its tensors' shapes"),
    ] = None,
    channels: Annotated[
        Path | None,
        typer.Option(
            parser=local_path,
            help="TOML file that describes input and channels of an exported network, .onnx or OpenVINO's .xml (see "
            "docs/architectures.md).",
            show_default=False,
        ),
    ] = None,
    calibrate_on: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            parser=local_path,
            help="Folder of annotated images with dataset.csv. Its split val is used to calibrate the Sobel constants, "
            "which scale the maps in post-processing.",
            show_default="the starter's constants",
        ),
    ] = None,
    sha256: Annotated[
        str | None,
        typer.Option(help="SHA-256 that the file must have.", show_default="the one of the first download"),
    ] = None,
) -> None:
    """Convert a published or exported network into a model package for `segment --model`.

    Names and URLs are downloaded. Examples: download a published HoVerNet and use it; convert a checkpoint file; import
    an exported network.

    hover-batch models import hovernet_fast-pannuke

    hover-batch segment cohort.csv -o out/ --model hovernet_fast-pannuke

    hover-batch models import hovernet_fast_pannuke_type_tf2pytorch.tar -o teacher.safetensors

    hover-batch models import my-network.onnx --channels my-network.toml -o mine.safetensors

    Downloads, and packages without -o, are stored in HOVER_BATCH_CACHE (default ~/.cache/hover-batch).

    Without a network connection, the error message says which file to copy to which place.
    """
    target = _target(source, out)
    if calibrate_on is not None and not (calibrate_on / "dataset.csv").is_file():
        raise InputError(f"--calibrate {calibrate_on}: holds no dataset.csv; give a folder of annotated images")
    suffix = _source_file(source).suffix
    is_package, is_exported = suffix == ".safetensors", suffix in (".onnx", ".xml")
    if suffix == ".pt2":
        raise InputError(
            f"{source}: is not read, because torch unpickles parts of .pt2 files, which could run code; export the "
            "network to ONNX (torch.onnx.export), and describe it with --channels"
        )
    if is_exported != (channels is not None) or (is_exported and (kind is not None or "://" in source)):
        raise InputError(
            f"{source}: --channels FILE.toml describes an exported network, a local .onnx or .xml file; it is needed "
            "for these, and for nothing else (see docs/architectures.md)"
        )
    if is_package and (kind is not None or calibrate_on is not None):
        raise InputError(
            f"{source}: is a package already, not a checkpoint; leave out --kind and --calibrate (to calibrate a "
            "package, use `hover-batch kd calibrate`)"
        )
    check_output_file("-o", target, (".safetensors",), make_folder=True)
    if is_package:
        _copy(source, sha256, target, replaceable=out is not None)
    else:
        network, card = _read(source, kind, channels, sha256)
        if out is None:
            _refuse_another(target, lambda existing: existing.card.training.get("source") == card.training["source"])
        card = replace(card, name=target.stem)
        if calibrate_on is not None:
            from kd.package import calibrated

            card = calibrated(network, card, calibrate_on)
        save_package(target, network, card, half=False)
    for line in (str(target), *describe(find_package(str(target)).card)):
        typer.echo(line)
    if out is None:
        typer.echo(f"to use it: --model {target.stem}")


def _read(source: str, kind: str | None, channels: Path | None, sha256: str | None) -> tuple[nn.Module, Card]:
    """Return the network and the card of a checkpoint, or with `channels` of an exported network."""
    if channels is None:
        from hover_batch.model.checkpoint import read_checkpoint

        return read_checkpoint(source, kind, sha256)
    from hover_batch.model.architectures.exported import read_exported

    path = Path(source)
    if not path.is_file():
        raise PackageError(f"{source}: no such file")
    if sha256 is not None and sha256_file(path) != sha256.lower():
        raise PackageError(f"{source}: its sha256 is {sha256_file(path)}, not {sha256}; download it again")
    network, card = read_exported(path, channels, find_package("starter").card.sobel)
    return network, replace(
        card, training=dict(card.training) | {"source": {"file": path.name, "sha256": sha256_file(path)}}
    )


def _target(source: str, out: Path | None) -> Path:
    """Return the file to write: `out`, or the one in the cache that is named after the source.

    InputError if it cannot be a package's name.
    """
    if out is not None:
        if out.suffix != ".safetensors":
            raise InputError(f"-o {out}: must end in .safetensors")
        return out
    try:
        name = source if source in KINDS else _source_file(source).stem
    except ValueError as error:
        raise InputError(f"{source}: is not a valid URL ({error})") from error
    if not is_package_name(name):
        raise InputError(f"{source}: {name!r} cannot be the name of a package in the cache; give -o FILE.safetensors")
    return cached_package(name)


def _source_file(source: str) -> Path:
    """Return the source's file; for a URL, the one that it is downloaded to."""
    return download_path(source) if "://" in source else Path(source)


def _copy(source: str, sha256: str | None, target: Path, *, replaceable: bool) -> None:
    """Copy a package to `target`, after its weights are checked.

    PackageError if they do not match its card or `sha256`, InputError if `target` exists, holds another package, and is
    not `replaceable`.
    """
    if "://" in source:
        from hover_batch.model.fetch import fetched

        package = find_package(str(fetched(source, sha256)), "package")
    else:
        package = find_package(str(Path(source).absolute()), "package")
        if sha256 is not None and package.sha256 != sha256.lower():
            raise PackageError(
                f"{source}: checksum mismatch: its sha256 is {package.sha256}, not {sha256}; download it again"
            )
    load_tensors(package)
    if not replaceable:
        _refuse_another(target, lambda existing: existing.sha256 == package.sha256)
    with replacing(target) as temporary:
        shutil.copyfile(package.path, temporary)


def _refuse_another(target: Path, same: Callable[[Package], bool]) -> None:
    """Raise InputError if `target` holds a package of another source, which other commands may use by this name."""
    if target.exists() and not same(find_package(str(target), "package")):
        raise InputError(
            f"{target}: a package from another source has this name already; remove it, or give -o FILE.safetensors"
        )


def list_packages(
    folder: Annotated[Path, typer.Argument(help="Folder whose packages are also listed.", parser=local_path)] = Path(
        "."
    ),
) -> None:
    """List the packages on this machine, and the published models that can be imported.

    The packages are the two starters, those in the cache, and those in FOLDER. The cost of a published model is its
    number of multiply-accumulates (MACs) per kept pixel of a slide. MACs on the margins of tiles are included.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one that holds .safetensors files")
    cached = [path.stem for path in cached_packages()]
    for name in (*INSTALLED, *cached, *map(str, sorted(folder.glob("*.safetensors")))):
        try:
            package = find_package(name)
        except PackageError:  # a .safetensors file of another program
            continue
        card, size = package.card, package.path.stat().st_size / 1e6
        typer.echo(f"{name}: {_architecture(card)}, {card.taxonomy.name}, {card.mpp:g} µm")
        typer.echo(f"    {size:.1f} MB; seams {_SEAMS[card.seam_exact]}; licence: {_line(card.licence)}")
    typer.echo("can be imported (`hover-batch models import NAME` or FILE):")
    for name, kind in KINDS.items():
        how = "by name or file" if kind.by_name else "by file"
        weights, cost = COSTS[name]
        classes = ", ".join(c.name for c in kind.taxonomy.nuclei)
        typer.echo(f"  {name}: {f'{kind.architecture} {kind.encoders[0]}'.rstrip()}, {kind.taxonomy.name} ({how})")
        typer.echo(f"    {kind.mpp:g} µm; classes: {classes}; seams {_SEAMS[kind.seam_exact]}")
        typer.echo(f"    {weights / 1e6:.1f} million weights; {cost / 1000:,.0f} thousand MACs per kept pixel")
        typer.echo(f"    source: {kind.source}; licence: {kind.licence}")
        typer.echo(f"    published scores: {kind.scores}")


def show_package(
    model: PackageArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole card as JSON.")] = False,
) -> None:
    """Show a package's architecture, classes, training data, licence and checksum."""
    package = find_package(model, "package")
    if as_json:
        typer.echo(json.dumps({**package.card.to_json(), "sha256": package.sha256}, indent=2, ensure_ascii=False))
        return
    for line in describe(package.card):
        typer.echo(line)
    typer.echo(f"  file: {package.path}, {package.path.stat().st_size / 1e6:.1f} MB, sha256 {package.sha256}")


def verify_packages(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...", help="Packages to check.", show_default="the starters and the whole cache"
        ),
    ] = None,
) -> None:
    """Verify the checksums of packages and downloads.

    The weights of packages are checked against their cards, and, if no MODEL is given, downloaded files against their
    first download.

    Exit codes: 0 all files are intact, 2 at least one is corrupted.
    """
    checks: list[tuple[str, Callable[[], object]]] = [
        (name, functools.partial(_check_weights, name))
        for name in models or [*INSTALLED, *(path.stem for path in cached_packages())]
    ]
    if not models:
        checks += [(str(path), functools.partial(check_download, path)) for path in cached_downloads()]
    corrupted = False
    for name, check in checks:
        try:
            check()
        except PackageError as error:
            corrupted = True
            typer.echo(f"CORRUPTED  {name}: {error}")
        else:
            typer.echo(f"ok         {name}")
    if corrupted:
        raise typer.Exit(PackageError.exit_code)


def _check_weights(name: str) -> None:
    """Raise PackageError if a package cannot be read, or its weights do not match its card."""
    load_tensors(find_package(name, "package"))


def print_card(model: PackageArgument) -> None:
    """Print a package's model card for Hugging Face: Markdown with a YAML header.

    Example:

    hover-batch models card my-student.safetensors > my-repository/README.md
    """
    from hover_batch.model.hub_card import hub_card

    typer.echo(hub_card(find_package(model, "package")), nl=False)


def describe(card: Card) -> list[str]:
    """Return `card` as lines of text: its name, then one indented line per known fact.

    Control characters, which could change the terminal, are replaced by spaces.
    """
    calibration = card.metrics.get("calibration", "not recorded")
    if isinstance(calibration, Mapping):
        calibration = f"found on annotated images: cut at {calibration.get('cut')} of their median minimum"
    rows = {
        "architecture": _architecture(card),
        "classes": f"{', '.join(c.name for c in card.taxonomy.nuclei)} ({card.taxonomy.name})",
        "pixels": f"{card.mpp:g} µm; {card.tile_in} in, {card.tile_out} kept; {card.input_scaling}",
        "Sobel constants": calibration,
        "seams": _SEAMS[card.seam_exact],
        "seen": card.training.get("seen") or listed_entries(nested(card.training, "data", "train")),
        "started from": earlier_data(card),
        "recognised": card.training.get("recognised"),
        "source": listed_entries(nested(card.training, "source")),
        "licence": card.licence,
    }
    return [_line(card.name), *(f"  {name}: {_line(value)}" for name, value in rows.items() if value)]


def _line(value: object) -> str:
    """Return the value as one line, without control characters, which a terminal would obey."""
    return re.sub(r"[^\S ]+|[\x00-\x1f\x7f-\x9f]", " ", str(value))


_SEAMS = {True: "exact", False: "merged by overlap"}
"""Words for a card's `seam_exact`."""


def _architecture(card: Card) -> str:
    """Return the names of the architecture and of its encoder, if it has one."""
    return f"{card.architecture} {card.encoder}".rstrip()


models_app = typer.Typer(
    name="models",
    help="List, import, check and describe model packages.",
    no_args_is_help=True,
    suggest_commands=False,
    pretty_exceptions_enable=False,
)
models_app.command("list")(list_packages)
models_app.command("show")(show_package)
models_app.command("import")(import_package)
models_app.command("verify")(verify_packages)
models_app.command("card")(print_card)

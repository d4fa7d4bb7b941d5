"""`hover-batch models`: list, import, check and describe model packages."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from hover_batch.errors import InputError, PackageError
from hover_batch.files import replacing
from hover_batch.model.cache import (
    cached_downloads,
    cached_package,
    cached_packages,
    check_download,
    download_path,
    is_name,
)
from hover_batch.model.hub_card import entry, listed
from hover_batch.model.package import Card, Package, find_package, load_tensors, save_package
from hover_batch.model.published import KINDS

PackageArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="`starter`, a name in the cache, a .safetensors file or its folder.")
]


def import_package(
    source: Annotated[
        str,
        typer.Argument(
            help="hover_net's .tar, tiatoolbox's .pth, HoVer-UNet's .pth or a package's .safetensors: a file, an "
            "https URL, or a name that `models list` shows.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The .safetensors file to write.",
            show_default="in the cache, where --model finds it by its name",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help=f"What it is: {', '.join(KINDS)}.", show_default="what its tensors' shapes fit"),
    ] = None,
    calibrate_on: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            help="Folder with dataset.csv: find the Sobel constants on its images of the split val.",
            show_default="the starter's constants",
        ),
    ] = None,
    sha256: Annotated[
        str | None,
        typer.Option(help="What the file's hash must be.", show_default="what it was when it was first fetched"),
    ] = None,
) -> None:
    """Turn published weights into a model package, which `segment --model` runs. Names and URLs are fetched.

    hover-batch models import hovernet_fast-pannuke

    hover-batch segment cohort.csv -o out/ --model hovernet_fast-pannuke

    hover-batch models import hovernet_fast_pannuke_type_tf2pytorch.tar -o teacher.safetensors

    What is fetched, and packages without -o, lie in HOVER_BATCH_CACHE (default ~/.cache/hover-batch).

    Without a network, the message says which file to bring where.
    """
    target = _target(source, out)
    if calibrate_on is not None and not (calibrate_on / "dataset.csv").is_file():
        raise InputError(f"--calibrate {calibrate_on}: no dataset.csv there; give a folder of annotated images")
    ready = _source_file(source).suffix == ".safetensors"
    if ready and (kind is not None or calibrate_on is not None):
        raise InputError(
            f"{source}: is a package, not a checkpoint: leave out --kind and --calibrate (`hover-batch kd "
            "calibrate` finds a package's constants anew)"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {target}: {error.strerror}") from error
    if target.is_dir() or not os.access(target.parent, os.W_OK):
        raise InputError(f"-o {target}: cannot be written; name another file")
    if ready:
        _copy(source, sha256, target, replaceable=out is not None)
    else:
        from hover_batch.model.checkpoint import read_checkpoint

        network, card = read_checkpoint(source, kind, sha256)
        if out is None:
            _refuse_another(target, lambda held: held.card.training.get("source") == card.training["source"])
        card = replace(card, name=target.stem)
        if calibrate_on is not None:
            from kd.package import calibrated

            card = calibrated(network, card, calibrate_on)
        save_package(target, network, card, half=False)
    for line in (str(target), *describe(find_package(str(target)).card)):
        typer.echo(line)
    if out is None:
        typer.echo(f"use it by its name: --model {target.stem}")


def _target(source: str, out: Path | None) -> Path:
    """The file to write: the one that was named, or that of the source's name in the cache."""
    if out is not None:
        if out.suffix != ".safetensors":
            raise InputError(f"-o {out}: a package is a .safetensors file")
        return out
    try:
        name = source if source in KINDS else _source_file(source).stem
    except ValueError as error:
        raise InputError(f"{source}: is no URL ({error})") from error
    if not is_name(name):
        raise InputError(f"{source}: {name!r} cannot be a name in the cache; give -o FILE.safetensors")
    return cached_package(name)


def _source_file(source: str) -> Path:
    """The file, or what it will be called when it is fetched."""
    return download_path(source) if "://" in source else Path(source)


def _copy(source: str, sha256: str | None, target: Path, *, replaceable: bool) -> None:
    """A package that is one already, checked and under its new name."""
    if "://" in source:
        from hover_batch.model.fetch import fetched

        package = find_package(str(fetched(source, sha256)), "package")
    else:
        package = find_package(str(Path(source).absolute()), "package")
        if sha256 is not None and package.sha256 != sha256.lower():
            raise PackageError(f"{source}: its sha256 is {package.sha256}, not {sha256}; fetch it again")
    load_tensors(package)
    if not replaceable:
        _refuse_another(target, lambda held: held.sha256 == package.sha256)
    with replacing(target) as temporary:
        shutil.copyfile(package.path, temporary)


def _refuse_another(target: Path, same: Callable[[Package], bool]) -> None:
    """InputError where the cache has a package of other origin under the name, which somebody may rely on."""
    if target.exists() and not same(find_package(str(target), "package")):
        raise InputError(f"{target}: is of another source; remove it, or give -o FILE.safetensors")


def list_packages(
    folder: Annotated[Path, typer.Argument(help="Where else to look for packages.")] = Path("."),
) -> None:
    """List the packages at hand and the published models that can be imported."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name one that holds .safetensors files")
    cached = [path.stem for path in cached_packages()]
    for name in ("starter", *cached, *map(str, sorted(folder.glob("*.safetensors")))):
        try:
            card = find_package(name).card
        except PackageError:  # somebody else's safetensors
            continue
        typer.echo(f"{name}: {_architecture(card)}, {card.taxonomy.name}, {card.mpp:g} µm")
    typer.echo("can be imported:")
    for name, kind in KINDS.items():
        how = "by name or file" if kind.by_name else "by file"
        typer.echo(f"  {name}: {kind.architecture}, {kind.taxonomy.name} ({how})")


def show_package(
    model: PackageArgument,
    as_json: Annotated[bool, typer.Option("--json", help="The whole card.")] = False,
) -> None:
    """Show what a package is, what it has seen and under which licence it comes."""
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
        typer.Argument(metavar="[MODEL]...", help="Packages.", show_default="the starter and all of the cache"),
    ] = None,
) -> None:
    """Recompute hashes: of packages' weights against their cards, of fetched files against their first use.

    Exit codes: 0 all are as they were, 2 one is not.
    """
    checks: list[tuple[str, Callable[[], object]]] = [
        (name, lambda name=name: load_tensors(find_package(name, "package")))  # type: ignore[misc]
        for name in models or ["starter", *(path.stem for path in cached_packages())]
    ]
    if not models:
        checks += [(str(path), lambda path=path: check_download(path)) for path in cached_downloads()]  # type: ignore[misc]
    corrupted = False
    for name, check in checks:
        try:
            check()
        except PackageError as error:
            corrupted = True
            typer.echo(f"HARMED  {name}: {error}")
        else:
            typer.echo(f"ok      {name}")
    if corrupted:
        raise typer.Exit(PackageError.exit_code)


def print_card(model: PackageArgument) -> None:
    """Print a package's card as Hugging Face has it: Markdown with YAML at its head.

    hover-batch models card my-student.safetensors > my-repository/README.md
    """
    from hover_batch.model.hub_card import hub_card

    typer.echo(hub_card(find_package(model, "package")), nl=False)


def describe(card: Card) -> list[str]:
    """The card in words, a line each, whatever somebody has written into it."""
    calibration = card.metrics.get("calibration", "not recorded")
    if isinstance(calibration, Mapping):
        calibration = f"found on annotated images: cut at {calibration.get('cut')} of their median minimum"
    rows = {
        "architecture": _architecture(card),
        "classes": f"{', '.join(c.name for c in card.taxonomy.nuclei)} ({card.taxonomy.name})",
        "pixels": f"{card.mpp:g} µm; {card.tile_in} in, {card.tile_out} kept; {card.input_scaling}",
        "Sobel constants": calibration,
        "seen": card.training.get("seen") or listed(entry(card.training, "data", "train")),
        "recognised": card.training.get("recognised"),
        "source": listed(entry(card.training, "source")),
        "licence": card.licence,
    }
    return [card.name, *(f"  {name}: {_line(value)}" for name, value in rows.items() if value)]


def _line(value: object) -> str:
    """One line without what a terminal would obey."""
    return re.sub(r"[^\S ]+|[\x00-\x1f\x7f-\x9f]", " ", str(value))


def _architecture(card: Card) -> str:
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

"""The commands `hover-batch models …`. Heavy imports stand inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hover_batch.errors import InputError, PackageError
from hover_batch.model.package import Card, find_package
from hover_batch.model.published import KINDS

if TYPE_CHECKING:
    from torch import nn

    Calibrate = Callable[[nn.Module, Card, Path], Card]
    """Network, card and folder of annotated images → the card with the Sobel constants that are best there."""


def models_app(calibrate: Calibrate) -> typer.Typer:
    """The commands. `calibrate` is kd's, which nothing on this floor may import."""
    app = typer.Typer(
        name="models",
        help="List, show and import model packages.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.command("list")(list_models)
    app.command("show")(show)

    @app.command("import")
    def import_(
        source: Annotated[
            str,
            typer.Argument(
                help="hover_net's .tar, tiatoolbox's .pth, HoVer-UNet's .pth, or a name that tiatoolbox fetches.",
                show_default=False,
            ),
        ],
        out: Annotated[Path, typer.Option("--out", "-o", help="The .safetensors file to write.", show_default=False)],
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
        sha256: Annotated[str | None, typer.Option(help="What the file's hash must be.", show_default=False)] = None,
    ) -> None:
        """Turn a published checkpoint into a model package, which `segment --model` runs.

        hover-batch models import hovernet_fast_pannuke_type_tf2pytorch.tar -o teacher.safetensors
        """
        if out.suffix != ".safetensors":
            raise InputError(f"-o {out}: a package is a .safetensors file")
        if calibrate_on is not None and not (calibrate_on / "dataset.csv").is_file():
            raise InputError(f"--calibrate {calibrate_on}: no dataset.csv there; give a folder of annotated images")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"-o {out}: {error.strerror}") from error
        from hover_batch.model.checkpoint import read_checkpoint
        from hover_batch.model.package import save_package

        network, card = read_checkpoint(source, kind, sha256)
        card = replace(card, name=out.stem)
        if calibrate_on is not None:
            card = calibrate(network, card, calibrate_on)
        save_package(out, network, card, half=False)
        for line in (str(out), *describe(find_package(str(out)).card)):
            typer.echo(line)

    return app


def list_models(
    folder: Annotated[Path, typer.Argument(help="Where else to look for packages.")] = Path("."),
) -> None:
    """List the packages at hand and the published models that can be imported."""
    for name in ("starter", *map(str, sorted(folder.glob("*.safetensors")))):
        try:
            card = find_package(name).card
        except PackageError:  # somebody else's safetensors
            continue
        typer.echo(f"{name}: {_architecture(card)}, {card.taxonomy.name}, {card.mpp:g} µm")
    typer.echo("can be imported:")
    for name, kind in KINDS.items():
        how = "by name or file" if kind.by_name else "by file"
        typer.echo(f"  {name}: {kind.architecture}, {kind.taxonomy.name} ({how})")


def show(
    model: Annotated[str, typer.Argument(help="A package: `starter`, a .safetensors file or its folder.")],
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


def describe(card: Card) -> list[str]:
    """The card in words."""
    calibration: Any = card.metrics.get("calibration", "not recorded")
    if not isinstance(calibration, str):
        calibration = f"found on annotated images: cut at {calibration.get('cut')} of their median minimum"
    rows = {
        "architecture": _architecture(card),
        "classes": f"{', '.join(c.name for c in card.taxonomy.nuclei)} ({card.taxonomy.name})",
        "pixels": f"{card.mpp:g} µm; {card.tile_in} in, {card.tile_out} kept; {card.input_scaling}",
        "Sobel constants": calibration,
        "seen": card.training.get("seen") or _listed(card.training.get("data", {}).get("train", {})),
        "recognised": card.training.get("recognised"),
        "source": _listed(card.training.get("source", {})),
        "licence": card.licence,
    }
    return [card.name, *(f"  {name}: {value}" for name, value in rows.items() if value)]


def _architecture(card: Card) -> str:
    return f"{card.architecture} {card.encoder}".rstrip()


def _listed(values: dict[str, Any]) -> str:
    """`a: 1, b: 2`; of sources their images."""
    return ", ".join(f"{k} {v['images']} images" if isinstance(v, dict) else f"{k} {v}" for k, v in values.items())

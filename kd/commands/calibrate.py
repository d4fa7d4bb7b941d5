"""`kd calibrate`: find the best Sobel constants of a model package, and measure its errors, on annotated images."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer

from hover_batch.errors import InputError
from hover_batch.formatting import plain_console
from kd.commands.options import Data, PackageArgument, PackageFile, Source, Threads, check_package_file

if TYPE_CHECKING:
    from kd.evaluation.calibrate import Trial

WORTHWHILE = 0.003
"""Smallest gain in mean PQ, on both folds, for which changing a number is reported as worth a search."""


def calibrate(
    model: PackageArgument,
    data: Data,
    out: PackageFile,
    source: Source = None,
    fold: Annotated[str, typer.Option(help="Fold whose images the search uses.")] = "val",
    check: Annotated[str, typer.Option(help="Fold on which the result is checked.")] = "test",
    threads: Threads = 0,
) -> None:
    """Find the best Sobel constants and measure the errors of a model; write both to a copy of its package.

    HoVerNet's post-processing scales the Sobel maps of h and v by their minimum and maximum in each image. hover-batch
    uses four constants instead (--sobel-norm fixed), so that nuclei do not depend on how a slide is tiled.

    Prints PQ, F_d and the ratio of predicted to annotated nuclei for both folds, compared with HoVerNet's normalisation
    (`window`). Also prints whether other values of HoVerNet's nucleus threshold, Sobel kernel or opening would improve
    PQ on both folds.

    The errors are fitted on both folds. For the calibrated columns of tables, they are how often a predicted nucleus is
    a true one, and how often its class is correct. For the intervals in summaries (docs/bars.md), they are by how much
    the number of predicted nuclei differs from the number of annotated ones. The errors are also tested on each source
    after a fit on all others.

    Example:

    hover-batch kd calibrate student.safetensors --data annotated.zarr -o calibrated.safetensors
    """
    import dataclasses

    from hover_batch.config import InferSettings
    from hover_batch.model.images import batch_of, predict_image
    from hover_batch.model.package import find_package, save_with_card
    from hover_batch.model.predict import load_predictor
    from kd.data.classes import fully_annotated
    from kd.data.datasets import read_data
    from kd.data.pixel_size import check_pixel_size
    from kd.data.samples import hashes_of
    from kd.evaluation.calibrate import predict_all, search, trial, try_others
    from kd.evaluation.measured_errors import evidence, fit_uncertainty, notes, paired_images
    from kd.evaluation.scores import plain
    from kd.training.state import contents

    check_package_file(out)
    if fold == check:
        raise InputError(f"--check {check}: is the fold of the search, which proves nothing; give another fold")
    package = find_package(model, "package")
    check_pixel_size(package.card, f"package {model}")
    if package.card.system != "hover":
        raise InputError(
            f"package {model}: has no Sobel constants, since its nuclei are found as by {package.card.system}; it can "
            "be used as it is"
        )
    read = {name: read_data(data, [name], source) for name in (fold, check)}
    samples = {name: fully_annotated(of_fold.samples) for name, of_fold in read.items()}
    if not samples[fold]:
        of = f" of {', '.join(source)}" if source else ""
        raise InputError(
            f"--fold {fold}: {data} has no image of this fold{of} whose nuclei are all outlined; give another fold or "
            "--source"
        )
    if not samples[check]:
        typer.echo(f"note: --check {check}: {data} has no such image of this fold; the result is not checked", err=True)
    batch = batch_of(package.card, (s.image.shape for images in samples.values() for s in images))
    predictor = load_predictor(package, InferSettings(threads=threads, batch=batch))
    maps_of = partial(predict_image, predictor)
    predicted = {}
    for name, images in samples.items():
        typer.echo(f"predicting {len(images)} images of {name}", err=True)
        predicted[name] = predict_all(maps_of, images)
    found = search(predicted[fold])
    typer.echo("search done; trying other numbers", err=True)
    trials = {
        name: (trial(of_fold, None, None), trial(of_fold, found.cut, found.constants))
        for name, of_fold in predicted.items()
        if of_fold
    }
    others = {name: try_others(of_fold, found.cut) for name, of_fold in predicted.items() if of_fold}

    _print(f"{package.card.name}, each cut on {fold}", {_cut(t): t for t in found.trials})
    if check in trials:
        window, fixed = trials[check]
        _print(f"the same, on {check}", {_cut(window): window, _cut(fixed): fixed})
    gains = {
        setting: {name: by_name[setting].mean_pq - by_name["as they are"].mean_pq for name, by_name in others.items()}
        for setting in others[fold]
        if setting != "as they are"
    }
    for setting, by_fold in gains.items():
        worth_it = check in by_fold and all(gain >= WORTHWHILE for gain in by_fold.values())
        listed = ", ".join(f"{gain:+.4f} on {name}" for name, gain in by_fold.items())
        typer.echo(f"{setting}: PQ {listed}: {'worth a search' if worth_it else 'not worth a search'}")
    typer.echo("measuring errors", err=True)
    compared = samples
    if read[fold].taxonomy != package.card.taxonomy:
        typer.echo("note: the classes of the data are not the model's, so type_prob is not calibrated", err=True)
        compared = {name: [dataclasses.replace(s, types=None) for s in images] for name, images in samples.items()}
    all_compared = chain.from_iterable(compared.values())
    paired = paired_images(maps_of, all_compared, found.constants, package.card.taxonomy)
    uncertainty, measured = fit_uncertainty(paired), evidence(paired)
    for line in notes(uncertainty, measured):
        typer.echo(line)
    metrics = {
        **package.card.metrics,
        "errors": measured,
        "calibration": {
            **found.to_json(),
            "data": contents(samples[fold]),
            "saw": hashes_of(samples[fold]),
            "precision": predictor.precision,
            "gain_over_window": plain({n: _gain(fixed, window) for n, (window, fixed) in trials.items()}),
            "other_numbers": plain(gains),
        },
    }
    card = dataclasses.replace(
        package.card,
        name=out.stem,
        sobel=found.constants.to_json(),
        metrics=metrics,
        uncertainty=uncertainty.to_json(),
    )
    save_with_card(package, card, out)
    typer.echo(str(out))


def _cut(t: Trial) -> str:
    return t.norm if t.cut is None else f"{t.norm}, cut {t.cut:g}"


def _gain(fixed: Trial, window: Trial) -> dict[str, float]:
    return {source: fixed.pq[source] - window.pq[source] for source in fixed.pq}


def _print(title: str, trials: dict[str, Trial]) -> None:
    from rich.table import Table

    sources = list(next(iter(trials.values())).pq)
    table = Table(title=title, caption="PQ / F_d / predicted ÷ annotated nuclei")
    for column in ("", *sources, "mean"):
        table.add_column(column, justify="right" if column else "left")
    for name, t in trials.items():
        cells = (f"{t.pq[s]:.4f} / {t.f_d[s]:.4f} / {t.count[s]:.2f}" for s in sources)
        table.add_row(name, *cells, f"{t.mean_pq:.4f} / {t.mean_f_d:.4f}")
    plain_console(width=max(80, 24 * (len(sources) + 2))).print(table)

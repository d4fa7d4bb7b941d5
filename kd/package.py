"""Make model packages from training checkpoints: calibrate and score the weights, and write them with a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from hover_batch.config import InferSettings
from hover_batch.errors import InputError, PackageError
from hover_batch.model.architectures import architecture
from hover_batch.model.card import Card
from hover_batch.model.checkpoint import DAMAGED
from hover_batch.model.heads import SYSTEMS
from hover_batch.model.images import batch_of, predict_image
from hover_batch.model.package import find_package, not_finite, save_package
from hover_batch.model.predict import Predictor
from hover_batch.nuclei.systems import splitter
from hover_batch.taxonomy import Taxonomy
from kd.data.classes import fully_annotated, sources_by_class
from kd.data.datasets import MPP, read_data
from kd.data.samples import hashes_of, truth_sha256
from kd.evaluation.calibrate import calibrate
from kd.evaluation.evaluate import evaluate
from kd.evaluation.measured_errors import evidence, fit_uncertainty, notes, paired_images
from kd.evaluation.scores import shown
from kd.evaluation.slide_limits import slide_limits
from kd.training.config import ENCODERS, TrainConfig
from kd.training.initial_weights import build_network
from kd.training.mean import read_checkpoints
from kd.training.state import contents

OPEN = {"tnbc": "TNBC", "nuinsseg": "NuInsSeg", "dsb2018": "DSB 2018"}
"""Sources under CC BY 4.0 or CC0 → their proper names. Weights trained only on these are under CC BY 4.0."""
KNOWN = OPEN | {
    "consep": "CoNSeP",
    "monuseg": "MoNuSeg",
    "pannuke": "PanNuke",
    "monusac": "MoNuSAC",
    "gbm40": "GBM40",
    "lgg_tcga": "LGG-TCGA",
    "cpm15": "CPM-15",
}
"""All known sources → their proper names. Those that are not in OPEN are under CC BY-NC-SA 4.0, or published for
research without a licence; weights trained on them are under CC BY-NC-SA 4.0."""
ORGANS = {"consep": "colon", "monusac": "kidney, lung, prostate and breast", "pannuke": "19 tissues"}
"""Sources whose annotations of types are used → their tissues."""
NOT_CALIBRATED = "none, because there are no validation images: the Sobel constants are the starter's"
"""Entry for the calibration in the card of a package that could not be calibrated."""


def package_path(config: TrainConfig) -> Path:
    """Return the path of the package in the output folder of the training with the settings `config`.

    Its name is student.safetensors for a U-Net and teacher.safetensors for both forms of HoVerNet. For other models it
    is the model's name, such as dist.safetensors.
    """
    names = {"unet": "student", "hovernet-fast": "teacher", "hovernet-original": "teacher"}
    return config.out / f"{names.get(config.model, config.model)}.safetensors"


def make_package(checkpoints: Sequence[Path], data: Path, out: Path, threads: int = 0) -> str:
    """Write the weights of a training checkpoint, or the mean of several, as a package.

    Return its path and scores as text for the user.

    The Sobel constants are found on those images of the validation folds in which all nuclei are outlined; without any,
    the starter's constants are used, and the card says so. Systems other than HoVerNet's have no Sobel constants. The
    limits that flag unusual slides are from the same images.

    The card also has scores and measured errors on the validation folds and, if the network was trained only on the
    fold train, on the fold test. They are computed with the packaged weights (students: float16). This takes minutes.
    Progress is printed to stdout. In this process, torch's number of threads is set for a CPU, and TF32 is switched off
    in cuDNN for a GPU.

    `checkpoints`: one or more files that trainings wrote. With several, the card records the `steps` and `settings` of
    the first, and those of all under `mean_of`. `data`: the annotated images of the training. `out`: package to write;
    missing folders are created, and an existing package is replaced. `threads`: threads of the network on the CPU; 0
    for all cores.

    Raises InputError if a checkpoint or the data cannot be read, weights do not fit the settings, several cannot be
    averaged (see `read_checkpoints`), the validation images or their annotations are not those of the training, there
    are neither annotated nor predicted nuclei to calibrate on, or an image has too many nuclei to pair; PackageError if
    a weight is not finite; OSError if the package cannot be written.
    """
    saved = read_checkpoints(checkpoints)
    given = ", ".join(map(str, checkpoints))
    config, record = saved["config"], saved["record"]
    try:
        taxonomy = Taxonomy.from_json(record["taxonomy"])
        network = build_network(config, len(taxonomy.classes))
        network.load_state_dict(saved["shipped"])
        folds = {"val": config["val_folds"]} | ({"test": ["test"]} if config["train_folds"] == ["train"] else {})
        sources = record["data"]["train"]
        validated_on = (record["saw"]["val"], record["truth_sha256"]["val"])
        licence = _licence(sources, record["teacher"], record["before"])
        note = _note(sources, taxonomy, n_averaged=len(checkpoints))
        kind = architecture(config["model"])
    except DAMAGED as error:
        raise InputError(f"{given}: weights do not fit the settings; train again with another --out") from error
    half = config["model"] in ENCODERS
    if half:
        network.half().float()  # score the weights as they are stored in the package
    if not_finite(network.state_dict()):
        too_large = " or too large for float16" if half else ""
        raise PackageError(
            f"{given}: a weight is not finite{too_large}, because a training has diverged; train again with a "
            "lower --lr"
        )
    splits = {
        part: [s for s in read_data(data, part_folds).samples if s.source in sources]
        for part, part_folds in folds.items()
    }
    if (hashes_of(splits["val"]), truth_sha256(splits["val"])) != validated_on:
        raise InputError(
            f"--data {data}: differs from the validation images or annotations of {given}; give the data of the "
            "training"
        )
    tile_in, tile_out = kind.tile
    card = Card(
        name=out.stem,
        architecture=kind.name,
        system=kind.system,
        encoder=config["encoder"] if half else "",
        taxonomy=taxonomy,
        mpp=MPP,
        tile_in=tile_in,
        tile_out=tile_out,
        sobel={},
        seam_exact=SYSTEMS[kind.system].seam_exact,
        licence=licence,
        training={
            "steps": saved["step"],
            "settings": config,
            "mean_of": saved["mean_of"],
            "before": record["before"],
            "teacher": record["teacher"],
            "saw": record["saw"],
            "saw_groups": record["saw_groups"],
            "data": record["data"] | {part: contents(samples) for part, samples in splits.items()},
            "note": note,
        },
    )
    batch = batch_of(card, (s.image.shape for samples in splits.values() for s in samples))
    predictor = Predictor(network, card, InferSettings(threads=threads, batch=batch))
    maps_of = partial(predict_image, predictor)

    outlined = fully_annotated(splits["val"])
    if kind.system != "hover":
        calibration: dict[str, Any] | str = f"none: {kind.system} has no Sobel constants"
        sobel: Mapping[str, float] = {}
    elif outlined:
        print(f"calibrating on {len(outlined)} images of {', '.join(folds['val'])}", flush=True)
        found = calibrate(maps_of, outlined)
        sobel, calibration = found.constants.to_json(), {**found.to_json(), "saw": hashes_of(outlined)}
    else:
        sobel, calibration = find_package("starter").card.sobel, NOT_CALIBRATED
    post = splitter(kind.system, sobel)
    paired = paired_images(maps_of, chain.from_iterable(splits.values()), post, taxonomy)
    uncertainty, measured = fit_uncertainty(paired), evidence(paired)
    scores = {}
    for part, samples in splits.items():
        print(f"scoring {len(samples)} images of {', '.join(folds[part])}", flush=True)
        scores[part] = {s.source: s.to_json() for s in evaluate(maps_of, samples, post, taxonomy)}
    card = replace(
        card,
        sobel=sobel,
        limits=slide_limits(outlined),
        uncertainty=uncertainty.to_json(),
        metrics={**scores, "calibration": calibration, "errors": measured, "precision": predictor.precision},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_package(out, network, card, half=half)
    return "\n".join(
        [
            str(out),
            *([f"calibration: {calibration}"] if isinstance(calibration, str) else []),
            *_lines(scores),
            *notes(uncertainty, measured),
        ]
    )


def calibrated(network: nn.Module, card: Card, data: Path) -> Card:
    """Return a copy of `card` with the best Sobel constants for `network`, found on the fold val of `data`.

    The search is recorded in the card's metrics. Only sources that outline every nucleus are used. `network` is set to
    evaluation mode, and may be moved to a GPU. In this process, torch's number of threads is set for a CPU, and TF32 is
    switched off in cuDNN for a GPU.

    `network`: network with the weights of the model. `card`: card of the model. `data`: annotated images (see
    `read_data`).

    Raises InputError if the fold has no image of these sources, there are neither annotated nor predicted nuclei, or
    the data cannot be read.
    """
    samples = fully_annotated(read_data(data, ["val"]).samples)
    if not samples:
        raise InputError(
            f"--calibrate {data}: has no image of the fold val whose nuclei are all outlined; give other data"
        )
    batch = batch_of(card, (s.image.shape for s in samples))
    predictor = Predictor(network, card, InferSettings(batch=batch))
    found = calibrate(partial(predict_image, predictor), samples)
    calibration = {
        **found.to_json(),
        "data": contents(samples),
        "saw": hashes_of(samples),
        "precision": predictor.precision,
    }
    return replace(card, sobel=found.constants.to_json(), metrics={**card.metrics, "calibration": calibration})


def _licence(
    sources: Mapping[str, Any], teacher: Mapping[str, Any] | None = None, before: Mapping[str, Any] | None = None
) -> str:
    """Return the licence of weights trained on these sources.

    `teacher`: entry of the record for the teacher, if they were distilled. `before`: origin of the initial weights; the
    weights are not free if these are not.
    """
    started = (before or {}).get("licence", "")
    if sources.keys() <= KNOWN.keys():
        names = _list([KNOWN[source] for source in sorted(sources)])
        free = sources.keys() <= OPEN.keys() and (not started or started.startswith("CC BY 4.0"))
        terms = f"{'CC BY 4.0' if free else 'CC BY-NC-SA 4.0, research only'}: trained on {names}"
    else:
        terms = f"as its data's: trained on {_list(sorted(sources))}; see their licences before giving it away"
    if started not in ("", terms):
        terms = f"{terms}; started from weights with the licence: {started}"
    return terms if teacher is None else f"{terms}; distilled from {teacher['name']} ({teacher['licence']})"


def _note(sources: Mapping[str, Mapping[str, int]], taxonomy: Taxonomy, n_averaged: int = 1) -> str:
    """Return notes for readers of the scores, such as the sources from which each class was learnt.

    `n_averaged`: number of trainings whose weights were averaged.
    """
    notes = []
    if n_averaged > 1:
        notes.append(f"The weights are the mean of those of {n_averaged} trainings.")
    if "consep" in sources:
        notes.append("CoNSeP's tiles are split by tile: patients may be shared between splits.")
    untyped = [KNOWN.get(s, s) for s, entry in sources.items() if not entry["typed"]]
    typed = [KNOWN.get(s, s) for s, entry in sources.items() if entry["typed"]]
    if untyped:
        alone = (
            f"the type branch saw {_list(typed)} alone" if typed else "the annotations taught the type branch nothing"
        )
        notes.append(f"{_list(untyped)} {'has' if len(untyped) == 1 else 'have'} no types, so {alone}.")
    typed_sources = [s for s, entry in sources.items() if entry["typed"]]
    for name, taught_by in sources_by_class(taxonomy, typed_sources).items():
        if taught_by:
            named = _list([f"{KNOWN[s]} ({ORGANS[s]})" for s in taught_by])
            notes.append(f"The class {name} was learnt from {named}.")
    return " ".join(notes)


def _list(names: list[str]) -> str:
    """Join names: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _lines(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Return one line for each part (val, test) and source."""
    return [
        f"{part} {source}: PQ {shown(s['pq'])}  AJI {shown(s['aji'])}  Dice {shown(s['dice'])}  F_d {shown(s['f_d'])}"
        for part, by_source in scores.items()
        for source, s in by_source.items()
    ]

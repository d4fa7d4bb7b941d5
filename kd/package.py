"""Turn a checkpoint into a model package: calibrate and score its weights, and write them with a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hover_batch.config import InferSettings
from hover_batch.errors import InputError, PackageError
from hover_batch.model.images import batch_of, predict_image
from hover_batch.model.package import Card, find_package, save_package
from hover_batch.model.predict import Predictor
from hover_batch.model.teacher import HoVerNet
from hover_batch.nuclei.watershed import SobelConstants
from hover_batch.taxonomy import Taxonomy
from kd.data.classes import PARTIAL
from kd.data.datasets import MPP, read_data
from kd.data.samples import hashes_of
from kd.evaluation.calibrate import calibrate
from kd.evaluation.evaluate import evaluate
from kd.evaluation.slide_limits import slide_limits
from kd.training.config import TrainConfig
from kd.training.initial_weights import build_network
from kd.training.state import contents, read_checkpoint

OPEN = {"tnbc": "TNBC", "nuinsseg": "NuInsSeg", "dsb2018": "DSB 2018"}
"""Sources under CC BY 4.0 or CC0, and their proper names: weights trained on these alone are under CC BY 4.0."""
KNOWN = OPEN | {
    "consep": "CoNSeP",
    "monuseg": "MoNuSeg",
    "pannuke": "PanNuke",
    "monusac": "MoNuSAC",
    "gbm40": "GBM40",
    "lgg_tcga": "LGG-TCGA",
    "cpm15": "CPM-15",
}
"""Sources for which weights trained on them are under CC BY-NC-SA 4.0 here: with those of OPEN some that say so, and
some that state no licence but are given for research."""
NOT_CALIBRATED = "none, for want of validation images: the Sobel constants are the starter's"
TILE = (320, 256)
"""Sides in pixels of a student's input and output tile. The margin of 32 px is one step of the deepest features."""


def package_path(config: TrainConfig) -> Path:
    """Return the file that a training's package is written to, in its output folder."""
    return config.out / ("student.safetensors" if config.model == "unet" else "teacher.safetensors")


def make_package(checkpoint: Path, data: Path, out: Path, threads: int = 0) -> str:
    """Write the package to `out` and return lines with its scores. It takes minutes, and prints its progress.

    The Sobel constants are searched on the validation folds of `data`; if these are empty, the starter's are used, and
    the card says so. The card also has the limits of slides like these images; and scores of the validation folds and,
    if training was on the fold train, of test, computed with the weights as shipped. Raises InputError if there is no
    checkpoint, PackageError if a weight is not finite.
    """
    saved = read_checkpoint(checkpoint)
    config, record = saved["config"], saved["record"]
    taxonomy = Taxonomy.from_json(record["taxonomy"])
    network = build_network(config, len(taxonomy.classes))
    network.load_state_dict(saved["shipped"])
    student = not isinstance(network, HoVerNet)
    if student:
        network.half().float()  # what is scored is what is shipped
    if not all(t.isfinite().all() for t in network.state_dict().values()):
        too_large = " or too large for float16" if student else ""
        raise PackageError(f"{checkpoint}: a weight is not finite{too_large}; the training has diverged")
    folds = {"val": config["val_folds"]} | ({"test": ["test"]} if config["train_folds"] == ["train"] else {})
    sources = record["data"]["train"]
    splits = {part: [s for s in read_data(data, named).samples if s.source in sources] for part, named in folds.items()}
    tile_in, tile_out = network.arch.tile if isinstance(network, HoVerNet) else TILE
    card = Card(
        name=out.stem,
        architecture=config["model"],
        encoder=config["encoder"] if student else "",
        taxonomy=taxonomy,
        mpp=MPP,
        tile_in=tile_in,
        tile_out=tile_out,
        sobel={},
        licence=_licence(sources, record["teacher"]),
        training={
            "steps": saved["step"],
            "settings": config,
            "before": record["before"],
            "teacher": record["teacher"],
            "saw": record["saw"],
            "saw_groups": record["saw_groups"],
            "data": record["data"] | {part: contents(samples) for part, samples in splits.items()},
            "note": _note(sources),
        },
    )
    predictor = Predictor(network, card, InferSettings(threads=threads, batch=batch_of(card)))

    def maps_of(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return predict_image(predictor, image)

    how: dict[str, Any] | str = NOT_CALIBRATED
    constants = SobelConstants.from_json(find_package("starter").card.sobel)
    if whole := [s for s in splits["val"] if s.source not in PARTIAL]:
        print(f"calibrating on {len(whole)} images of {', '.join(folds['val'])}", flush=True)
        found = calibrate(maps_of, whole)
        constants, how = found.constants, {**found.to_json(), "saw": hashes_of(whole)}
    scores = {}
    for part, samples in splits.items():
        print(f"scoring {len(samples)} images of {', '.join(folds[part])}", flush=True)
        scores[part] = {s.source: s.to_json() for s in evaluate(maps_of, samples, constants, taxonomy)}
    card = replace(
        card,
        sobel=constants.to_json(),
        limits=slide_limits(whole),
        metrics={**scores, "calibration": how, "precision": predictor.precision},
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    save_package(out, network, card, half=student)
    return "\n".join([str(out), *([] if whole else [f"calibration: {how}"]), *_lines(scores)])


def calibrated(network: nn.Module, card: Card, data: Path) -> Card:
    """Return the card with the best Sobel constants for `network` on the fold val of `data`, all sources.

    Raises InputError if the fold is empty.
    """
    samples = [s for s in read_data(data, ["val"]).samples if s.source not in PARTIAL]
    if not samples:
        raise InputError(f"--calibrate {data}: has no image of the fold val whose nuclei are all outlined")
    predictor = Predictor(network, card, InferSettings(batch=batch_of(card)))
    found = calibrate(lambda image: predict_image(predictor, image), samples)
    how = {**found.to_json(), "data": contents(samples), "saw": hashes_of(samples), "precision": predictor.precision}
    return replace(card, sobel=found.constants.to_json(), metrics={**card.metrics, "calibration": how})


def _licence(sources: Mapping[str, Any], teacher: Mapping[str, Any] | None) -> str:
    """Return the licence that follows from the sources, and from the teacher if there is one."""
    if sources.keys() <= KNOWN.keys():
        names = _list([KNOWN[source] for source in sorted(sources)])
        free = sources.keys() <= OPEN.keys()
        terms = f"{'CC BY 4.0' if free else 'CC BY-NC-SA 4.0, research only'}: trained on {names}"
    else:
        terms = f"as its data's: trained on {_list(sorted(sources))}; see their licences before giving it away"
    return terms if teacher is None else f"{terms}; distilled from {teacher['name']} ({teacher['licence']})"


def _note(sources: Mapping[str, Mapping[str, int]]) -> str:
    """Return what a reader of the scores should know."""
    notes = []
    if "consep" in sources:
        notes.append("CoNSeP's tiles are split by tile: patients may be shared between splits.")
    untyped = [KNOWN.get(s, s) for s, entry in sources.items() if not entry["typed"]]
    typed = [KNOWN.get(s, s) for s, entry in sources.items() if entry["typed"]]
    if untyped:
        alone = (
            f"the type branch saw {_list(typed)} alone" if typed else "the annotations taught the type branch nothing"
        )
        notes.append(f"{_list(untyped)} {'has' if len(untyped) == 1 else 'have'} no types, so {alone}.")
    return " ".join(notes)


def _list(names: list[str]) -> str:
    """Join names as in `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _lines(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    return [
        f"{part} {source}: PQ {cell(s['pq'])}  AJI {cell(s['aji'])}  Dice {cell(s['dice'])}  F_d {cell(s['f_d'])}"
        for part, by_source in scores.items()
        for source, s in by_source.items()
    ]

"""Evaluate a model package on annotated images: scores, leakage and cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hover_batch.config import InferSettings, PostSettings
from hover_batch.errors import InputError
from hover_batch.files import write_atomically
from hover_batch.model.cost import Cost, cost_of
from hover_batch.model.heads import MapLayout
from hover_batch.model.images import batch_of, predict_image
from hover_batch.model.package import Package, find_package, load_network
from hover_batch.model.predict import Predictor, load_predictor
from hover_batch.nuclei.components import Splitter
from hover_batch.nuclei.image import nuclei_of
from hover_batch.nuclei.systems import splitter_of
from kd.data.datasets import Data, read_data
from kd.data.pixel_size import check_pixel_size
from kd.evaluation.evaluate import MapsOf, evaluate_data
from kd.evaluation.figure import Shown, figure
from kd.evaluation.leakage import Leak, leaks
from kd.evaluation.paired import Baseline, Paired, compared
from kd.evaluation.scores import SourceScores
from kd.evaluation.shift_scores import ShiftScores, score_shifts
from kd.evaluation.shifts import UNCHANGED, Shift
from kd.evaluation.timing import timed

FOLD = "test"
"""Fold that is scored by default."""
NOTIFY_EVERY_S = 30.0
"""Shortest interval between progress lines, in seconds."""

Notify = Callable[[str], object]
"""Function that is called with lines of progress."""
Image = NDArray[np.uint8]
"""(y, x, 3) uint8 RGB."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of `evaluate_package`."""

    label: str
    """Name of the row in tables."""
    package: Package
    """Evaluated package."""
    data: str
    """Name of the folder or cache with the images."""
    folds: tuple[str, ...]
    """Scored folds."""
    post: PostSettings
    """Settings of the post-processing."""
    precision: str
    """Precision of the network: fp32, fp16 or bf16."""
    scores: list[SourceScores]
    """Scores of each source."""
    leaks: list[Leak]
    """Images that the model has seen in training."""
    cost: Cost
    """Parameters and operations of the network."""
    timed: dict[str, Any]
    """Times, as from `kd.evaluation.timing.timed`; empty if nothing was timed."""
    shifts: list[ShiftScores]
    """Scores on changed images; empty if not requested."""
    baseline: Baseline | None
    """Scores to compare with; None without a comparison."""
    paired: list[Paired]
    """Comparison with the baseline, by source; empty without one."""
    picture: Image | None
    """Picture of images, annotations and predictions; None if not requested."""

    def to_json(self) -> dict[str, Any]:
        """Return the results without the picture as JSON values by name, for `kd tables` and for later comparisons.

        `model` is the package's name, `architecture` includes the encoder, and `label`, `sha256`, `data`, `folds`,
        `sobel_norm`, `min_area_px` and `precision` describe the run. The results are:

        - `sources`: by source, `SourceScores.to_json`;
        - `by_image`: by source, `SourceScores.images_to_json`;
        - `leakage`: a list of `Leak.to_json`;
        - `cost`: `Cost.to_json`, with the times of `timing.timed` if they were measured;
        - `shifts`, only if requested: a list of `ShiftScores.to_json`;
        - `against`, only with a baseline: its `label`, `sha256`, `sobel_norm` and `min_area_px`, and `sources`, which
          is `Paired.to_json` by source.
        """
        card = self.package.card
        report = {
            "label": self.label,
            "model": card.name,
            "sha256": self.package.sha256,
            "architecture": f"{card.architecture} {card.encoder}".rstrip(),
            "data": self.data,
            "folds": list(self.folds),
            "sobel_norm": self.post.sobel_norm,
            "min_area_px": self.post.min_area_px,
            "precision": self.precision,
            "sources": {s.source: s.to_json() for s in self.scores},
            "by_image": by_image(self.scores),
            "leakage": [leak.to_json() for leak in self.leaks],
            "cost": self.cost.to_json() | self.timed,
        }
        if self.shifts:
            report["shifts"] = [row.to_json() for row in self.shifts]
        if self.baseline:
            report["against"] = {
                "label": self.baseline.name,
                "sha256": self.baseline.sha256,
                "sobel_norm": self.baseline.sobel_norm,
                "min_area_px": self.baseline.min_area_px,
                "sources": {pair.source: pair.to_json() for pair in self.paired},
            }
        return report

    def write(self, path: Path) -> None:
        """Write `to_json` to the file `path`, atomically. Raises OSError if the file cannot be written."""
        write_atomically(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")


def by_image(scores: Sequence[SourceScores]) -> dict[str, list[dict[str, Any]]]:
    """Return the scores of each image as JSON values, by source (see `SourceScores.images_to_json`)."""
    return {s.source: s.images_to_json() for s in scores}


def evaluate_package(
    model: str,
    data: Path,
    *,
    folds: Sequence[str] = (FOLD,),
    sources: Sequence[str] | None = None,
    post: PostSettings | None = None,
    label: str | None = None,
    shift: bool = False,
    against: str | None = None,
    picture: bool = False,
    beside: str | None = None,
    time_network: bool = False,
    threads: int = 0,
    notify: Notify = lambda line: None,
) -> Evaluation:
    """Return the evaluation of a model package on annotated images.

    In this process, torch's number of threads is set for a CPU, and TF32 is switched off in cuDNN for a GPU.

    `model`: name or path of the package (see `find_package`). `data`, `folds`, `sources`: annotated images (see
    `read_data`). `post`: only `sobel_norm` and `min_area_px` are used; None for the defaults. `label`: name of the row
    in tables; None for the package's name. `shift`: also score the images after each of SHIFTS. `against`: another
    package, or the .json file of an earlier evaluation, to compare with; None for no comparison.

    `picture`: draw the predictions next to the annotations. `beside`: another package whose predictions are also drawn
    in the picture; None for none. `time_network`: measure the time of patches and of a tile. `threads`: threads of each
    network on the CPU; 0 for all cores. `notify`: called with lines about the progress.

    Raises InputError if a package is for another pixel size, the file `against` cannot be read or its scores are of
    other images, the data cannot be read or has no images in these folds, it is not known which classes the data and a
    model have in common, or an image has too many nuclei to pair. Raises PackageError if a package cannot be read, its
    network cannot be compiled, or its record of the training is malformed.
    """
    post = post or PostSettings()
    package = _package(model, "package")
    beside_package = _package(beside, "--beside") if beside else None
    baseline = Baseline.read(Path(against)) if against and against.endswith(".json") else None
    against_package = _package(against, "--against") if against and not baseline else None
    annotated = read_data(data, folds, sources)
    if not annotated.samples:
        of_sources = f" of {', '.join(sources)}" if sources else ""
        raise InputError(
            f"--fold {' '.join(folds)}: {data} has no image of this fold{of_sources}; give another --fold or --data"
        )
    if baseline:
        baseline.check(annotated.samples)
    leaked = leaks(package.card, annotated.samples)
    loaded = _Loaded.of(package, annotated, post, threads, notify)
    network = load_network(package)  # for the cost, as published; the predictor optimises its own copy
    scores = loaded.scores(annotated, UNCHANGED)
    if against_package:
        against_scores = _Loaded.of(against_package, annotated, post, threads, notify).scores(annotated, UNCHANGED)
        baseline = Baseline(
            name=against_package.card.name,
            sha256=against_package.sha256,
            sobel_norm=post.sobel_norm,
            min_area_px=post.min_area_px,
            by_image=by_image(against_scores),
        )
    drawn = None
    if picture:
        shown = [loaded.shown]
        if beside_package:
            shown.insert(0, _Loaded.of(beside_package, annotated, post, threads, notify).shown)
        drawn = figure(annotated, shown)
    return Evaluation(
        label=label or package.card.name,
        package=package,
        data=data.resolve().name,
        folds=tuple(dict.fromkeys(folds)),
        post=post,
        precision=loaded.predictor.precision,
        scores=scores,
        leaks=leaked,
        cost=cost_of(network, package.card),
        timed=loaded.timed(network, annotated) if time_network else {},
        baseline=baseline,
        paired=compared(by_image(scores), baseline) if baseline else [],
        shifts=score_shifts(loaded.scores, annotated, scores) if shift else [],
        picture=drawn,
    )


def score_test_fold(predictor: Predictor, splitter: Splitter | None, data: Path) -> dict[str, Any]:
    """Score a loaded network on the fold test of `data`. Return JSON values by name.

    `sources` has the result of `SourceScores.to_json` for each source. `leakage` is a list of {"text": sentence} about
    images that the model has seen in training or calibration.

    `predictor`: predictor of the network. `splitter`: post-processing of its maps; None for HoVerNet's with Sobel maps
    scaled by the extremes of each image. `data`: annotated images (see `read_data`).

    Raises InputError if the data cannot be read, the fold has no images, the model is for another pixel size, it is not
    known which classes the data and the model have in common, or an image has too many nuclei to pair; PackageError if
    the card's record of the training is malformed.
    """
    card = predictor.card
    check_pixel_size(card, card.name)
    annotated = read_data(data, [FOLD], None)
    if not annotated.samples:
        raise InputError(f"--truth {data}: has no image of the fold {FOLD}; give other annotated images")
    scores = evaluate_data(partial(predict_image, predictor), annotated, splitter, card.taxonomy)
    return {
        "sources": {s.source: s.to_json() for s in scores},
        "leakage": [{"text": str(leak)} for leak in leaks(card, annotated.samples)],
    }


def _package(name: str, where: str) -> Package:
    package = find_package(name, where)
    check_pixel_size(package.card, f"{where} {name}")
    return package


@dataclass(frozen=True)
class _Loaded:
    """Package with a loaded network."""

    package: Package
    predictor: Predictor
    post: PostSettings
    notify: Notify

    @classmethod
    def of(cls, package: Package, data: Data, post: PostSettings, threads: int, notify: Notify) -> _Loaded:
        """Load the network of `package`, with a batch size for the images of `data`."""
        batch = batch_of(package.card, (sample.image.shape for sample in data.samples))
        return cls(package, load_predictor(package, InferSettings(threads=threads, batch=batch)), post, notify)

    @property
    def shown(self) -> Shown:
        """Model for the picture (see `kd.evaluation.figure`): name, prediction, post-processing and classes."""
        card = self.package.card
        return Shown(
            card.name,
            partial(predict_image, self.predictor),
            splitter_of(card, self.post.sobel_norm),
            card.taxonomy,
            self.post.min_area_px,
        )

    def scores(self, data: Data, shift: Shift) -> list[SourceScores]:
        """Return the scores by source on the images of `data`, changed by `shift`, and report the progress."""
        shown = self.shown
        what = f"{shown.name}, {shift.name}"
        self.notify(what)
        maps_of = _reporting(shown.maps_of, what, len(data.samples), self.notify)
        return evaluate_data(maps_of, data, shown.splitter, shown.taxonomy, min_area_px=shown.min_area_px, shift=shift)

    def timed(self, network: nn.Module, data: Data) -> dict[str, Any]:
        """Return the times of the model (see `kd.evaluation.timing.timed`), of which `network` is the plain network."""
        shown = self.shown
        layout = MapLayout(len(shown.taxonomy.classes))

        def nuclei(image: Image) -> object:
            return nuclei_of(shown.maps_of(image), shown.splitter, layout, shown.min_area_px)

        self.notify(f"{shown.name}, times")
        return timed(network, self.predictor, nuclei, [sample.image for sample in data.samples])


def _reporting(maps_of: MapsOf, what: str, images: int, notify: Notify) -> MapsOf:
    """Return `maps_of` with a line of progress at most every NOTIFY_EVERY_S seconds. `images`: number of calls."""
    done, printed_at = 0, time.monotonic()

    def reporting(image: Image) -> Image:
        nonlocal done, printed_at
        maps = maps_of(image)
        done += 1
        if (now := time.monotonic()) - printed_at >= NOTIFY_EVERY_S:
            printed_at = now
            notify(f"{what}: {done} of {images} images")
        return maps

    return reporting

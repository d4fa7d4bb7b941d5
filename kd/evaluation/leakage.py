"""Find leakage: images on which a model is scored and which it has seen in training or calibration.

The entry `training` of a card records the images: `saw` (fold → first hexadecimal digits of `Sample.image_sha256`) and
`saw_groups` (fold → `source/group`). Older cards have only `data` (fold → source → counts), which identifies images by
fold and source; cards of published models have `seen`, a sentence. `before` is the training of the initial weights, and
`teacher` contains the training of the teacher; the images of both count as seen. Folds other than `train` were used to
choose the checkpoint or the Sobel constants. The images of a later calibration are `saw` in the card's
`metrics["calibration"]`; in older cards, the fold val of the sources in its `data`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hover_batch.errors import PackageError
from hover_batch.model.card import Card
from kd.data.samples import SHA_DIGITS, Sample

SAME_IMAGES = {"monuseg": "kumar", "kumar": "monuseg"}
"""Sources with the same images under another name."""

Training = Mapping[str, Any]
"""Entry `training` of a card."""


@dataclass(frozen=True)
class Leak:
    """Scored images of one source that a model has seen in training or calibration."""

    source: str
    """Name of the source."""
    how: str
    """Clause that states how they were seen."""
    certain: bool
    """False if only the patients may be the same, or if it is not recorded which images were seen."""
    samples: tuple[str, ...]
    """Ids of the images."""
    of: int
    """Number of scored images of the source."""

    @property
    def mark(self) -> str:
        """Sign that marks the source in tables: † if certain, else ‡."""
        return "†" if self.certain else "‡"

    def __str__(self) -> str:
        return f"{self.source}, {len(self.samples)} of {self.of} images: {self.how}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values by name, and under `text` the sentence for readers."""
        return {**asdict(self), "samples": list(self.samples), "text": str(self)}


def leaks(card: Card, samples: Sequence[Sample]) -> list[Leak]:
    """Return the scored images that the model of `card` has seen, by source, certain leaks first.

    The list is empty if there are none. A sample is listed only with the strongest kind of reason that applies: seen in
    training, seen in calibration, of a seen patient, possibly seen. Images that the model itself has seen are not
    listed again for the model from which its training started.

    `card`: card of the model. `samples`: scored images.

    Raises PackageError if the card's record of the training is malformed.
    """
    try:
        records = [*_records("the model", card.training), *_calibration(card)]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise PackageError(
            f"package {card.name}: its card does not say which images it has seen ({error}); export it again"
        ) from error
    found: list[Leak] = []
    for source in dict.fromkeys(s.source for s in samples):
        of_source = [s for s in samples if s.source == source]
        listed: set[str] = set()
        for kind in (_IMAGE, _CONSTANTS, _PATIENT, _DOUBT):
            newly_listed: set[str] = set()
            for record in records:
                if record.kind == kind:
                    known = listed | newly_listed if record.earlier else listed
                    ids = tuple(s.id for s in of_source if s.id not in known and record.holds(s))
                    newly_listed.update(ids)
                    if ids:
                        found.append(Leak(source, record.how, kind != _DOUBT, ids, len(of_source)))
            listed |= newly_listed
    return found


_IMAGE, _CONSTANTS, _PATIENT, _DOUBT = "image", "constants", "patient", "doubt"


@dataclass(frozen=True)
class _Record:
    """One entry of a card about seen images."""

    kind: str
    """_IMAGE, _CONSTANTS (seen in calibration only), _PATIENT, or _DOUBT (possibly seen)."""
    how: str
    """Clause that states how they were seen."""
    holds: Callable[[Sample], bool]
    """Returns whether a sample is among them."""
    earlier: bool = False
    """Whether they were seen in the training of the initial weights."""


def _records(who: str, training: Training) -> Iterator[_Record]:
    """Yield the images seen in one training, and in those of its initial weights and its teacher."""
    saw: Mapping[str, Sequence[str]] = training.get("saw") or {}
    by_name: Mapping[str, Mapping[str, Any]] = training.get("data") or {}
    for fold, hashes in saw.items():
        yield _Record(_IMAGE, f"{who} was {_verb(fold)} them", _one_of(hashes))
    if not saw:
        for fold in by_name:
            if fold != "test":
                how = f"{who} was {_verb(fold)} the {fold} images of this source, by their names"
                yield _Record(_IMAGE, how, _in_fold(fold, by_name[fold]))
    for fold, groups in (training.get("saw_groups") or {}).items():
        yield _Record(_PATIENT, f"{who} was {_verb(fold)} other images of their patients", _of_group(groups))
    if trained_on := by_name.get("train"):
        how = f"{who} was trained on other images of this source; patients, which are not recorded, may be shared"
        yield _Record(_DOUBT, how, _of_unknown_patient(trained_on))
    if seen := training.get("seen"):
        # It is certain only if the published model has seen the whole source.
        kind = _IMAGE if "whole data set" in seen or "seen all of it" in seen else _DOUBT
        yield _Record(kind, f"{who} has seen: {seen}", _named_in(seen))
    if before := training.get("before"):
        origin = who if who.startswith("what ") else f"what {who} started from"
        yield from (replace(record, earlier=True) for record in _records(origin, before))
    if teacher := training.get("teacher"):
        yield from _records("the teacher" if who == "the model" else f"{who}'s teacher", teacher.get("training") or {})


def _calibration(card: Card) -> Iterator[_Record]:
    """Yield the images on which the Sobel constants were found."""
    calibration = card.metrics.get("calibration")
    if not isinstance(calibration, Mapping):
        return
    if "saw" in calibration:
        yield _Record(_CONSTANTS, "the model's Sobel constants were chosen on them", _one_of(calibration["saw"]))
    elif "data" in calibration:
        how = "the model's Sobel constants were chosen on the val images of this source, by their names"
        yield _Record(_CONSTANTS, how, _in_fold("val", calibration["data"]))


def _verb(fold: str) -> str:
    return "trained on" if fold == "train" else "chosen on"


def _named_in(seen: str) -> Callable[[Sample], bool]:
    words = set(re.findall(r"[a-z0-9]+", seen.lower()))

    def holds(sample: Sample) -> bool:
        source = sample.source.lower()
        return source in words or SAME_IMAGES.get(source, source) in words

    return holds


def _one_of(hashes: Sequence[str]) -> Callable[[Sample], bool]:
    known = frozenset(hashes)
    return lambda sample: sample.image_sha256[:SHA_DIGITS] in known


def _in_fold(fold: str, sources: Mapping[str, Any]) -> Callable[[Sample], bool]:
    return lambda sample: sample.fold == fold and sample.source in sources


def _of_group(groups: Sequence[str]) -> Callable[[Sample], bool]:
    known = frozenset(groups)
    return lambda sample: bool(sample.group) and f"{sample.source}/{sample.group}" in known


def _of_unknown_patient(sources: Mapping[str, Any]) -> Callable[[Sample], bool]:
    """Return a test for samples of these sources whose patient is unknown: no group, or a group for each image."""
    return lambda sample: sample.source in sources and sample.group in ("", sample.id)

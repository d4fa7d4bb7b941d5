"""Whether a model has seen the images that it is scored on.

A card's `training` says what was seen: `saw` (fold → first hexadecimal digits of `Sample.image_sha256`), `saw_groups`
(fold → `source/group`). Older cards have only `data` (fold → source → counts), which identifies images by fold and
source; cards of published models have `seen`, in words. `before` is the training of the model that this one started
from, and `teacher` holds that of its teacher; both count as seen. On folds other than `train` something was chosen: the
checkpoint, or the Sobel constants. Constants that were found later were found on the images of `saw` in the card's
`metrics["calibration"]`; in older cards, on the fold val of the sources in its `data`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hover_batch.model.package import Card
from kd.data.samples import SHA_DIGITS, Sample

SAME_IMAGES = {"monuseg": "kumar", "kumar": "monuseg"}
"""Sources that share images under two names."""

Training = Mapping[str, Any]


@dataclass(frozen=True)
class Leak:
    """Images of one source that were seen.

    `certain`: False if only the patients may be the same, or the record does not say which images were seen.
    `samples`: ids of the images.
    """

    source: str
    how: str
    certain: bool
    samples: tuple[str, ...]
    of: int
    """Number of the source's images that are scored."""

    @property
    def mark(self) -> str:
        """Sign that marks the source in tables."""
        return "†" if self.certain else "‡"

    def __str__(self) -> str:
        return f"{self.source}, {len(self.samples)} of {self.of} images: {self.how}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, and the sentence for readers as `text`."""
        return {**asdict(self), "samples": list(self.samples), "text": str(self)}


def leaks(card: Card, samples: Sequence[Sample]) -> list[Leak]:
    """Return the images that leaked into training, source by source, the certain ones first.

    An image that was trained on is not listed again as one that constants were found on, or whose patient was seen.
    """
    records = [*_records("the model", card.training), *_calibration(card)]
    found: list[Leak] = []
    for source in dict.fromkeys(s.source for s in samples):
        ours = [s for s in samples if s.source == source]
        listed: set[str] = set()
        for what in (_IMAGE, _CONSTANTS, _PATIENT, _DOUBT):
            hits = [
                (r, tuple(s.id for s in ours if s.id not in listed and r.holds(s))) for r in records if r.what is what
            ]
            found += [Leak(source, r.how, what is not _DOUBT, ids, len(ours)) for r, ids in hits if ids]
            listed.update(*(ids for _, ids in hits))
    return found


_IMAGE, _CONSTANTS, _PATIENT, _DOUBT = "image", "constants", "patient", "doubt"


@dataclass(frozen=True)
class _Record:
    """What a card says was seen: images, images for the constants only, patients, or possibly any of these."""

    what: str
    how: str
    holds: Callable[[Sample], bool]


def _records(who: str, training: Training) -> Iterator[_Record]:
    """Yield what one training, and those that it builds on, have seen."""
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
        # Certain only if the published model has seen all of the source.
        what = _IMAGE if "whole data set" in seen or "seen all of it" in seen else _DOUBT
        yield _Record(what, f"{who} has seen: {seen}", _named_in(seen))
    if before := training.get("before"):
        yield from _records(f"what {who} started from", before)
    if teacher := training.get("teacher"):
        yield from _records("the teacher" if who == "the model" else f"{who}'s teacher", teacher.get("training") or {})


def _calibration(card: Card) -> Iterator[_Record]:
    """Yield the images that the model's Sobel constants were found on."""
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
    """A group of its own for every image does not identify patients."""
    return lambda sample: sample.source in sources and sample.group in ("", sample.id)

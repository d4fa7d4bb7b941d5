"""Read the checkpoints of several trainings that began with the same weights, and average their weights.

The mean can be better than each of them and costs no more to run (Wortsman et al. 2022, Model soups, arXiv 2203.05482).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hover_batch.errors import InputError
from hover_batch.model.checkpoint import DAMAGED
from hover_batch.model.package import not_finite
from kd.training.state import read_checkpoint

COMMON = {
    "taxonomy": "classes",
    "saw": "images",
    "truth_sha256": "annotations or their order",
    "teacher": "teacher",
    "before": "initial weights",
}
"""Keys of `record_of` whose values must be equal → what they describe, for messages."""


def read_checkpoints(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the content of the first checkpoint, with the mean of the weights of all as `shipped`.

    Integers in the weights, such as the counters of batch normalisation, are those of the first. The key `mean_of` has
    the `steps` and `settings` of each training, in the order of `paths`; with one checkpoint, it is empty.

    `paths`: checkpoints (see `read_checkpoint`), at least one. Several must be from trainings that began with the same
    package and used the same images and teacher.

    Raises InputError if a checkpoint cannot be read, one is given twice, or they cannot be averaged; OSError if a file
    cannot be read.
    """
    first_path, *other_paths = paths
    first = read_checkpoint(first_path)
    if not other_paths:
        return {**first, "mean_of": []}
    weights: list[Mapping[str, Tensor]] = []
    trainings: list[dict[str, Any]] = []
    for path in paths:
        # Of the others, nothing else is kept, since the state of an optimiser is larger than the weights.
        saved = first if path == first_path else read_checkpoint(path)
        try:
            training = {"steps": saved["step"], "settings": saved["config"]}
            if training in trainings:
                same = paths[trainings.index(training)]
                raise InputError(f"{path}: is the same training as {same}; give each checkpoint once")
            _check(path, saved, first_path, first)
        except DAMAGED as error:
            raise InputError(
                f"{path}: its weights do not fit its settings; leave it out, or train again with another --out"
            ) from error
        trainings.append(training)
        weights.append(saved["shipped"])
    shipped = {name: _mean([tensors[name] for tensors in weights]) for name in weights[0]}
    return {**first, "shipped": shipped, "mean_of": trainings}


def _check(path: Path, saved: Mapping[str, Any], first_path: Path, first: Mapping[str, Any]) -> None:
    """Check that the checkpoint `saved` in `path` can be averaged with `first`.

    Raises InputError if it cannot, and exceptions of DAMAGED if its content is invalid.
    """
    shapes, shapes_of_first = ({n: t.shape for n, t in content["shipped"].items()} for content in (saved, first))
    if saved["config"]["model"] != first["config"]["model"] or shapes != shapes_of_first:
        raise InputError(f"{path}: has a different network from {first_path}; package them separately")
    for key, what in COMMON.items():
        if saved["record"][key] != first["record"][key]:
            raise InputError(
                f"{path}: differs from {first_path} in its {what}; give checkpoints of trainings with the same --data, "
                "--teacher and --init, or package them separately"
            )
    if saved["config"]["init"] is None:
        raise InputError(
            f"{path}: was trained without --init, and only trainings with the same --init can be averaged; package it "
            "alone"
        )
    if broken := not_finite(saved["shipped"]):
        raise InputError(
            f"{path}: {broken} holds values that are not finite, because the training has diverged; leave it out, or "
            "train it again with a lower --lr"
        )


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean of tensors of the same shape, in their dtype; of integers, the first tensor."""
    first = tensors[0]
    return torch.stack([t.double() for t in tensors]).mean(0).to(first.dtype) if first.is_floating_point() else first

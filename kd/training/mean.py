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
from kd.training.state import read_checkpoint

NETWORK = ("model", "encoder", "width")
"""Settings that determine the network, apart from its classes."""


def read_checkpoints(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the content of the first checkpoint, with the mean of the weights of all as `shipped`.

    Integers in the weights, such as the counters of batch normalisation, are those of the first. The key `mean_of` has
    the `steps` and `settings` of each training, in the order of `paths`; with one checkpoint, it is empty.

    `paths`: checkpoints (see `read_checkpoint`), at least one. Several must be from trainings that began with the same
    package and used the same images and teacher.

    Raises InputError if a checkpoint cannot be read, one is given twice, or they cannot be averaged; OSError if a file
    cannot be read.
    """
    first, *others = (read_checkpoint(path) for path in paths)
    if not others:
        return {**first, "mean_of": []}
    try:
        for path, other in zip(paths[1:], others, strict=True):
            _check(path, other, paths[0], first)
        averaged = [first, *others]
        trainings = [{"steps": saved["step"], "settings": saved["config"]} for saved in averaged]
        for i, training in enumerate(trainings):
            if training in trainings[:i]:
                same = paths[trainings.index(training)]
                raise InputError(f"{paths[i]}: is the same training as {same}; give each checkpoint once")
        shipped = {name: _mean([saved["shipped"][name] for saved in averaged]) for name in first["shipped"]}
    except DAMAGED as error:
        raise InputError(
            f"{', '.join(map(str, paths))}: weights do not fit the settings; train again with another --out"
        ) from error
    return {**first, "shipped": shipped, "mean_of": trainings}


def _check(path: Path, saved: Mapping[str, Any], first_path: Path, first: Mapping[str, Any]) -> None:
    """Check that the checkpoint `saved` in `path` can be averaged with `first`. Raises InputError if it cannot."""
    if [saved["config"][name] for name in NETWORK] != [first["config"][name] for name in NETWORK]:
        raise InputError(
            f"{path}: has a different network from {first_path} (--model or --encoder); package them separately"
        )
    if saved["record"] != first["record"]:
        raise InputError(
            f"{path}: its images, annotations, classes, teacher or initial weights are not those of {first_path}; give "
            "checkpoints of trainings with the same --data, --teacher and --init, or package them separately"
        )
    if first["config"]["init"] is None:
        raise InputError(
            f"{path} and {first_path}: were trained without --init, and the mean of networks that began with different "
            "random weights is useless; give checkpoints of trainings with the same --init, or package them separately"
        )


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean of tensors of the same shape, in their dtype; of integers, the first tensor."""
    first = tensors[0]
    return torch.stack([t.double() for t in tensors]).mean(0).to(first.dtype) if first.is_floating_point() else first

"""The state of a training, which its checkpoint stores so that it resumes as if it had never stopped."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hover_batch.errors import HoverBatchError, InputError
from hover_batch.taxonomy import Taxonomy
from kd.data.samples import Sample, hashes_of, truth_sha256
from kd.training.config import TrainConfig
from kd.training.crops import Teacher
from kd.training.schedule import Schedule

CHECKPOINT = "checkpoint.pt"


@dataclass
class State:
    """The part that changes during training.

    `shipped`: the network with the weights to package, which are averages or those of the best epoch.
    """

    model: nn.Module
    shipped: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    step: int = 0
    """Number of steps done."""
    best: float = math.inf
    """Lowest validation loss of an epoch."""
    ended: bool = False
    """True once the schedule has ended the training."""
    row: dict[str, float] | None = None
    """Log row of an epoch that is trained but not yet validated."""

    def save(self, config: TrainConfig, record: dict[str, Any]) -> None:
        """Write the checkpoint atomically. `record`: see `record_of`. Raises HoverBatchError if that fails."""
        path = config.out / CHECKPOINT
        temporary = path.with_suffix(".tmp")
        held = {name: getattr(self, name).state_dict() for name in ("model", "shipped", "optimizer", "schedule")}
        held |= {name: getattr(self, name) for name in ("step", "best", "ended", "row")}
        try:
            torch.save({"config": config.to_json(), "record": record, **held}, temporary)
        except RuntimeError as error:  # on a full disk torch reports an unexpected position
            temporary.unlink(missing_ok=True)
            raise HoverBatchError(
                f"{path} cannot be written; make sure that its disk has space and run the same command again: it "
                f"resumes from the last checkpoint ({str(error).splitlines()[0]})"
            ) from error
        os.replace(temporary, path)

    def resume(self, config: TrainConfig, record: dict[str, Any]) -> None:
        """Load the checkpoint, if there is one.

        Raises InputError if it was made with other settings, images or annotations, or another teacher.
        """
        path = config.out / CHECKPOINT
        if not path.exists():
            return
        saved = read_checkpoint(path)
        if saved["config"] != config.to_json():
            raise InputError(f"{path} was made with other settings; give another --out, or the same settings")
        for what, flag in (("saw", "--data"), ("truth_sha256", "--data"), ("teacher", "--teacher")):
            if saved["record"].get(what) != record[what]:
                raise InputError(f"{flag}: {path} was made with another; give another --out, or the same {flag}")
        for name in ("model", "shipped", "optimizer", "schedule"):
            getattr(self, name).load_state_dict(saved[name])
        self.step, self.best, self.ended, self.row = (saved[name] for name in ("step", "best", "ended", "row"))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `State.save` wrote; only tensors and plain values are unpickled.

    Raises InputError if there is no such file, it is not a checkpoint, or another version wrote it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; write one with `hover-batch kd train`")
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: not a checkpoint of `hover-batch kd train`, or damaged; train anew into another --out"
        ) from error
    if not isinstance(saved, dict) or not saved.keys() >= {"config", "record", "shipped", "step"}:
        raise InputError(
            f"{path} was written by an older version and cannot be resumed by this one; train anew into another --out"
        )
    return saved


def record_of(
    taxonomy: Taxonomy,
    training: Sequence[Sample],
    validation: Sequence[Sample],
    teacher: Teacher | None,
    before: dict[str, Any],
) -> dict[str, Any]:
    """Return the record of a training for the model card.

    `saw`: image hashes by part, as `hashes_of` gives them. `saw_groups`: their patients as source/group, if known.
    `truth_sha256`: hashes of their annotations. `before`: the training, or the source, of the weights it started from.
    """
    parts = {"train": training, "val": validation}
    taught = None
    if teacher is not None:
        card = teacher.card
        taught = {"sha256": teacher.sha256, "tta": teacher.tta} | {
            name: card[name] for name in ("name", "licence", "training")
        }
    return {
        "taxonomy": taxonomy.to_json(),
        "saw": {part: hashes_of(samples) for part, samples in parts.items()},
        "saw_groups": {
            part: sorted({f"{s.source}/{s.group}" for s in samples if s.group}) for part, samples in parts.items()
        },
        "truth_sha256": {part: truth_sha256(samples) for part, samples in parts.items()},
        "data": {part: contents(samples) for part, samples in parts.items()},
        "teacher": taught,
        "before": before,
    }


def contents(samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """Count, by source, the images, their nuclei, and the images with types."""
    found: dict[str, dict[str, int]] = {}
    for sample in samples:
        entry = found.setdefault(sample.source, {"images": 0, "nuclei": 0, "typed": 0})
        entry["images"] += 1
        entry["nuclei"] += len(np.unique(sample.instances)) - 1
        entry["typed"] += sample.types is not None
    return found

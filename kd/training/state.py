"""Save and restore the state of a training run, so that an interrupted run gives the same result."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hover_batch.errors import HoverBatchError, InputError
from hover_batch.model.checkpoint import DAMAGED, load_plain
from hover_batch.taxonomy import Taxonomy
from kd.data.samples import Sample, hashes_of, truth_sha256
from kd.teaching.teacher_cache import TeacherCache
from kd.training.config import TrainConfig
from kd.training.schedule import Schedule

CHECKPOINT = "checkpoint.pt"
"""Name of the checkpoint in the output folder."""


@dataclass
class State:
    """Everything that changes during training."""

    model: nn.Module
    """Network that is trained."""
    shipped: nn.Module
    """Network with the weights to package: the moving average, or the weights of the best epoch."""
    optimizer: torch.optim.Optimizer
    """Optimiser of `model`."""
    schedule: Schedule
    """Learning rate schedule of `optimizer`."""
    step: int = 0
    """Number of steps done."""
    best: float = math.inf
    """Lowest validation loss of an epoch."""
    ended: bool = False
    """True once the schedule has ended the training."""
    row: dict[str, float] | None = None
    """Log row of an epoch that is trained but not yet validated; None if there is none."""

    def save(self, config: TrainConfig, record: dict[str, Any]) -> None:
        """Write the checkpoint of `config.out` atomically; an existing one is replaced.

        `config`: settings of the training. `record`: record of the training, from `record_of`.

        Raises HoverBatchError if the checkpoint cannot be written; the previous checkpoint then remains.
        """
        path = config.out / CHECKPOINT
        temporary = path.with_suffix(".tmp")
        values = {name: getattr(self, name).state_dict() for name in ("model", "shipped", "optimizer", "schedule")}
        values |= {name: getattr(self, name) for name in ("step", "best", "ended", "row")}
        try:
            torch.save({"config": config.to_json(), "record": record, **values}, temporary)
        except RuntimeError as error:  # torch's error on a full disk: "unexpected pos"
            temporary.unlink(missing_ok=True)
            raise HoverBatchError(
                f"{path} cannot be written ({str(error).splitlines()[0]}); make sure that its disk has space and run "
                "the same command again: it resumes from the last checkpoint"
            ) from error
        os.replace(temporary, path)

    def resume(self, config: TrainConfig, record: dict[str, Any]) -> None:
        """Load the checkpoint of `config.out` into this state, if there is one.

        `config`: settings of the training. `record`: record of the training, from `record_of`.

        Raises InputError if the checkpoint is corrupted or was written by an older version, with other settings, images
        or annotations, or with another teacher; OSError if it cannot be read.
        """
        path = config.out / CHECKPOINT
        if not path.exists():
            return
        saved = read_checkpoint(path)
        wanted = config.to_json()
        # A version without a setting trained as its default does.
        given = {f.name: f.default for f in fields(config) if f.name in wanted} | saved["config"]
        if given != wanted:
            raise InputError(
                f"{path} was written with other settings ({_difference(given, wanted)}); give another --out, or the "
                "same settings"
            )
        for key, flag in (("saw", "--data"), ("truth_sha256", "--data"), ("teacher", "--teacher")):
            if saved["record"].get(key) != record[key]:
                raise InputError(
                    f"{flag}: {path} was written with other contents of {flag}; give another --out, or the same {flag}"
                )
        try:
            for name in ("model", "shipped", "optimizer", "schedule"):
                getattr(self, name).load_state_dict(saved[name])
            self.step, self.best, self.ended, self.row = (saved[name] for name in ("step", "best", "ended", "row"))
        except DAMAGED as error:
            raise InputError(f"{path}: its weights do not fit its settings; train again with another --out") from error


def _difference(saved: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Return the first setting that differs, with both values."""
    name = next(n for n in (saved | wanted) if saved.get(n) != wanted.get(n))
    return f"{name} {saved.get(name)}, not {wanted.get(name)}"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint that `State.save` wrote, with all tensors on the CPU.

    The keys are `config` (`TrainConfig.to_json`), `record` (see `record_of`), and the fields of `State`. Only tensors
    and plain values are unpickled.

    Raises InputError if there is no such file, it is not a checkpoint, or an older version wrote it; OSError if it
    cannot be read.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; give its {CHECKPOINT}")
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint; write one with `hover-batch kd train`")
    try:
        saved: dict[str, Any] = load_plain(path)
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums of tensors
            if archive.testzip():
                raise ValueError("checksum mismatch")
    except (*DAMAGED, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: not a checkpoint of `hover-batch kd train`, or corrupted; train again with another --out"
        ) from error
    if not isinstance(saved, dict) or not saved.keys() >= {"config", "record", "shipped", "step"}:
        raise InputError(
            f"{path} was written by an older version, and this one cannot resume it; train again with another --out"
        )
    return saved


def record_of(
    taxonomy: Taxonomy,
    training: Sequence[Sample],
    validation: Sequence[Sample],
    teacher: TeacherCache | None,
    origin: dict[str, Any],
) -> dict[str, Any]:
    """Return the record of a training for the checkpoint and the model card, as JSON values by name.

    - `taxonomy`: the classes;
    - `saw`: image hashes (see `hashes_of`) by part, train and val;
    - `saw_groups`: patients as source/group by part, where they are known;
    - `truth_sha256`: hash of the annotations by part;
    - `data`: counts by part and source (see `contents`);
    - `teacher`: `sha256` (of the package), `tta`, `name`, `licence` and `training` of the teacher; None without one;
    - `before`: `origin`.

    `taxonomy`: classes of the network. `training`, `validation`: images. `teacher`: stored outputs; None without
    distillation. `origin`: origin of the initial weights, from `starting_network`.
    """
    parts = {"train": training, "val": validation}
    teacher_record = None
    if teacher is not None:
        from_card = {name: teacher.card[name] for name in ("name", "licence", "training")}
        teacher_record = {"sha256": teacher.sha256, "tta": teacher.tta, **from_card}
    return {
        "taxonomy": taxonomy.to_json(),
        "saw": {part: hashes_of(samples) for part, samples in parts.items()},
        "saw_groups": {
            part: sorted({f"{s.source}/{s.group}" for s in samples if s.group}) for part, samples in parts.items()
        },
        "truth_sha256": {part: truth_sha256(samples) for part, samples in parts.items()},
        "data": {part: contents(samples) for part, samples in parts.items()},
        "teacher": teacher_record,
        "before": origin,
    }


def contents(samples: Sequence[Sample]) -> dict[str, dict[str, int]]:
    """Return the numbers of `images`, `nuclei` and images with types (`typed`) of each source, by source."""
    found: dict[str, dict[str, int]] = {}
    for sample in samples:
        entry = found.setdefault(sample.source, {"images": 0, "nuclei": 0, "typed": 0})
        entry["images"] += 1
        entry["nuclei"] += len(np.unique(sample.instances)) - 1
        entry["typed"] += sample.types is not None
    return found

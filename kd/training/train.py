"""Train a network step by step, with validation and a checkpoint after each epoch.

The same loop trains students, distilled or not, and teachers. It does not import ray, zarr or tiatoolbox, except that
reading a teacher's outputs or a .zarr cache needs zarr.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hover_batch.cohort.run_lock import locked
from hover_batch.errors import HoverBatchError, InputError
from hover_batch.model.heads import Heads
from hover_batch.model.package import find_package
from hover_batch.nuclei.systems import splitter
from hover_batch.taxonomy import NUCLEI
from kd.data.datasets import Data, Sample, read_data
from kd.panels import write_panel
from kd.teaching.teacher_cache import TeacherCache
from kd.training.class_weights import class_weights
from kd.training.config import TrainConfig
from kd.training.crops import batches, open_teacher, source_shares, training_crops, validation_crops
from kd.training.initial_weights import cut_of, starting_network
from kd.training.logs import Log
from kd.training.losses import BranchWeights
from kd.training.schedule import build_schedule
from kd.training.state import State, record_of
from kd.training.systems import SYSTEMS
from kd.training.validate import TYPICAL, examples, validate, validation_loss

LOCK = ".lock"
"""Name of the file in the output folder that a training locks."""
PANELS = "panels"
"""Folder of the example pictures in the output folder, one per epoch."""


def train(config: TrainConfig) -> nn.Module:
    """Train a network, or resume from the checkpoint in `config.out`. Return it with the weights to package.

    The network is in evaluation mode, on the GPU if there is one. Training pauses at `config.max_steps`; if the
    checkpoint is of a finished training, nothing is trained. The checkpoint, log.csv, TensorBoard files and pictures
    are written to `config.out`, and progress is printed to stdout. In this process, torch's random seed and number of
    threads are set, and OpenCV is limited to one thread.

    Raises InputError or PackageError if the data, the teacher's outputs or the initial weights cannot be read or do not
    fit the settings, the checkpoint was written with other settings or data, or another process trains in
    `config.out`; HoverBatchError if the loss is not finite or the checkpoint cannot be written; OSError if the log or
    a picture cannot be written.
    """
    torch.set_num_threads(config.threads)
    data = read_data(config.data, config.train_folds)
    shares = source_shares(config, data.samples)
    samples = [s for s in data.samples if s.source in shares]
    validation = [s for s in read_data(config.data, config.val_folds).samples if s.source in shares]
    # Annotations without types teach one class. A teacher, or the weights to start from, bring classes of their own.
    begins_typed = config.init is not None and find_package(str(config.init), "--init").card.taxonomy != NUCLEI
    typed = config.distils or begins_typed or any(s.types is not None for s in samples)
    taxonomy = data.taxonomy if typed else NUCLEI
    if config.schedule == "plateau" and not validation:
        raise InputError(
            f"--val-fold {' '.join(config.val_folds)}: {config.data} has no images of this fold, but the preset "
            f"{config.preset} needs a validation loss; give a fold with images"
        )
    teacher = open_teacher(config.teacher, taxonomy) if config.distils and config.teacher else None
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {config.out}: {error.strerror}; give a folder that can be written") from error
    with locked(config.out / LOCK, "--out"):
        return _train(config, Data(taxonomy, samples), validation, shares, teacher)


def _train(
    config: TrainConfig,
    data: Data,
    validation: Sequence[Sample],
    shares: Mapping[str, float],
    teacher: TeacherCache | None,
) -> nn.Module:
    """Train on `data` in the folder `config.out`, which exists and is locked; see `train`."""
    taxonomy, samples = data.taxonomy, data.samples
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    model, origin = starting_network(config, taxonomy)
    cut = cut_of(model)
    model.to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    shipped = copy.deepcopy(model).eval().requires_grad_(False)
    crops, epoch_steps = training_crops(samples, shares, config, cut, teacher)
    steps = len(crops) // config.batch
    fixed_crops = validation_crops(validation, shares, config, cut, teacher) if validation else None
    optimizer = _optimizer(config, model)
    state = State(model, shipped, optimizer, build_schedule(config, optimizer, steps))
    record = record_of(taxonomy, samples, validation, teacher, origin)
    state.resume(config, record)
    heads, loss_by = Heads(len(taxonomy.classes)), SYSTEMS[config.system].loss
    weights = class_weights(samples, len(taxonomy.classes), teacher, config.out) if config.class_weights else {}
    loss_of = loss_by(heads, config, *(_branch_weights(w, device) for w in weights.values()))
    log, system = Log(config.out), splitter(config.system, TYPICAL.to_json())

    def end_epoch(row: dict[str, float], whole: bool) -> None:
        """Validate, log, update the schedule and save.

        `whole`: False if --max-steps ended the epoch early; the schedule and the best loss then stay unchanged, so that
        the run can continue as if it had not paused.
        """
        validated = shipped if config.ema_decay else model.eval()
        if fixed_crops is not None:
            row["val_loss"] = validation_loss(validated, fixed_crops, loss_of, config.batch, device)
            row |= validate(validated, validation, device, taxonomy, system)
            picture = examples(validated, validation, device, taxonomy, teacher, system)
            write_panel(config.out / PANELS / f"epoch_{math.ceil(state.step / epoch_steps):04d}.jpg", picture)
        log.write(row)
        val_loss = row.get("val_loss", -math.inf)
        # Without validation, and until a whole epoch has been validated, the latest weights are the best.
        best_yet = fixed_crops is None or state.best == math.inf or (whole and val_loss < state.best)
        if not config.ema_decay and best_yet:
            shipped.load_state_dict(model.state_dict())
        if whole:
            state.best = min(state.best, val_loss)
            state.ended = not state.schedule.after(val_loss)
            state.row = None
        state.save(config, record)

    if state.row is not None:  # interrupted between the last step of an epoch and the end of its validation
        end_epoch(state.row, whole=True)
    stop = min(steps, config.max_steps or steps)
    if state.ended or state.step >= stop:
        return shipped
    listed = ", ".join(f"{source} {share:.0%}" for source, share in shares.items())
    print(
        f"training on {len(samples)} images ({listed}), steps {state.step} to {stop}, epochs of {epoch_steps}",
        flush=True,
    )
    epoch_started, first_step, sums, counts = time.monotonic(), state.step, dict[str, Tensor](), Counter[str]()
    for step, (image, targets) in enumerate(batches(crops, config.batch, device, state.step), start=state.step):
        state.schedule.before(step)
        model.train()
        torch.manual_seed((config.seed << 32) + step)  # for the encoder's stochastic depth: the same when resumed
        terms = loss_of.of_batch(model, image, targets)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()  # type: ignore[no-untyped-call]  # untyped in torch
        if config.clip:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        if config.ema_decay:
            _average(shipped, model, min(config.ema_decay, (1 + step) / (10 + step)))
        for name, term in terms.items():
            sums[name] = sums.get(name, torch.zeros((), device=device)) + term.detach().double()
        counts.update(terms.keys())  # a batch without types has no terms of tp
        state.step = done = step + 1
        s_per_step = (time.monotonic() - epoch_started) / (done - first_step)
        log.step(done, stop, s_per_step)
        whole = done % epoch_steps == 0 or done == steps
        if whole or done == stop:
            row = {"step": float(done), "lr": float(optimizer.param_groups[-1]["lr"]), "s_per_step": s_per_step}
            row |= {name: float(total) / counts[name] for name, total in sums.items()}
            if not math.isfinite(row["loss"]):
                raise HoverBatchError(
                    f"the loss is not finite after step {done} (the checkpoint in {config.out} is older): training has "
                    "diverged; give a lower --lr and another --out"
                )
            if whole:  # save before validating, so that the steps are not lost if validation fails
                state.row = dict(row)
                state.save(config, record)
            end_epoch(row, whole)
            epoch_started, first_step, sums, counts = time.monotonic(), done, {}, Counter()
        if state.ended or done == stop:
            break
    return shipped


def _optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    encoder = list(model.get_submodule("encoder").parameters()) if config.encoder_lr else []
    rest = [p for p in model.parameters() if not any(p is e for e in encoder)]
    groups = [{"params": encoder, "lr": config.encoder_lr}] if encoder else []
    groups.append({"params": rest, "lr": config.lr})
    return kind(groups, betas=config.betas, weight_decay=config.weight_decay)


def _branch_weights(weights: dict[str, list[float]], device: torch.device) -> BranchWeights:
    return BranchWeights(*(torch.tensor(weights[branch], device=device) for branch in ("np", "tp")))


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average towards the model's weights and running statistics in place; integers are copied."""
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)

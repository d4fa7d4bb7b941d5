"""Load the networks to be compared, each with its card, precision and runtime, or build one with random weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from hover_batch.config import InferSettings
from hover_batch.errors import PackageError
from hover_batch.model.architectures import architecture
from hover_batch.model.cache import cached_package
from hover_batch.model.card import Card
from hover_batch.model.checkpoint import card_of, read_checkpoint
from hover_batch.model.images import batch_of
from hover_batch.model.package import find_package, load_network
from hover_batch.model.predict import Predictor
from hover_batch.model.published import KINDS
from hover_batch.nuclei.components import Splitter
from hover_batch.nuclei.systems import splitter_of

TEACHER_FLAG = "--teacher-weights"
"""Option that names the weights of the teacher, which may be random instead."""


@dataclass(frozen=True)
class Side:
    """One of the two networks of a comparison."""

    name: str
    """Name for the reader."""
    card: Card
    """Card of the network."""
    network: nn.Module
    """Network with its weights, in evaluation mode."""
    settings: InferSettings
    """Settings of inference; `predictor` resolves `auto` for this machine."""
    random: bool = False
    """Whether the weights are random, so that times are meaningful but nuclei are not."""

    @cached_property
    def predictor(self) -> Predictor:
        """Predictor of the network on its device, loaded on first use.

        Loading sets the network to evaluation mode, and may move it to the device. In the whole process, torch's number
        of threads is set for a CPU, and TF32 is switched off in cuDNN for a GPU.

        InputError if the device or the runtime cannot be used, PackageError if the network cannot be compiled.
        """
        return Predictor(self.network, self.card, self.settings)

    def for_fields(self, side: int) -> Side:
        """Return a copy whose batch size suits square fields (see `batch_of`). The copy loads a predictor of its own.

        `side`: side of the fields in inference pixels. PackageError if the architecture on the card is not known.
        """
        return replace(self, settings=replace(self.settings, batch=batch_of(self.card, [(side, side)])))

    @property
    def splitter(self) -> Splitter | None:
        """Post-processing of the network (see `splitter_of`), with the constants on its card.

        PackageError if these are invalid.
        """
        return splitter_of(self.card)


def load_side(name: str, flag: str, settings: InferSettings) -> Side:
    """Load the network `name` with its weights on the CPU. A published checkpoint is downloaded if it is not cached.

    `name`: `starter`, another package (see `find_package`), a checkpoint (a .tar or .pth file) or a name in KINDS. An
    existing path or a package of this name in the cache takes precedence over a name in KINDS. `flag`: option that gave
    `name`, for messages. `settings`: settings of inference.

    PackageError if the network cannot be loaded or downloaded, OSError if the disk is full.
    """
    path = Path(name)
    try:
        to_download = name in KINDS and not path.exists() and not cached_package(name).exists()
        is_checkpoint = path.is_file() and path.suffix in (".tar", ".pth")
    except OSError as error:
        raise PackageError(f"{flag} {name}: cannot be read ({error.strerror}); check the path") from error
    if to_download or is_checkpoint:
        try:
            network, card = read_checkpoint(name)
        except PackageError as error:
            if not to_download:
                raise
            alternative = "; or compare only costs, with random weights: --timing-only" if flag == TEACHER_FLAG else ""
            raise PackageError(
                f"{flag}: the weights {name} cannot be downloaded ({error}). Download the checkpoint on a machine with "
                f"a network connection (see https://github.com/vqdang/hover_net), and give the file: {flag} FILE.tar"
                f"{alternative}"
            ) from error
        return Side(name, card, network.eval().requires_grad_(False), settings)
    package = find_package(name, flag)
    return Side(package.card.name, package.card, load_network(package), settings)


def random_teacher(name: str, settings: InferSettings) -> Side:
    """Return the published network `name` with random weights, to measure costs without a download.

    `name`: name of a published network in KINDS. `settings`: settings of inference.

    PackageError if no published network has this name.
    """
    if name not in KINDS:
        raise PackageError(
            f"{TEACHER_FLAG} {name}: with --timing-only, give the name of a published model: {', '.join(KINDS)}"
        )
    kind = architecture(KINDS[name].architecture)
    card = replace(card_of(name, kind), name=f"{name}, random weights", licence="none")
    return Side(card.name, card, kind.build(card, None).eval().requires_grad_(False), settings, random=True)

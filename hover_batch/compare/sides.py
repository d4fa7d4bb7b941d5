"""What is compared: a network with its card, its precision and its runtime, or one of random weights in its place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from hover_batch.config import InferSettings
from hover_batch.errors import PackageError
from hover_batch.model.cache import cached_package
from hover_batch.model.checkpoint import read_checkpoint
from hover_batch.model.images import batch_of
from hover_batch.model.package import STARTER, Card, find_package, load_network
from hover_batch.model.predict import Predictor
from hover_batch.model.published import KINDS
from hover_batch.model.teacher import TeacherArch, build_teacher
from hover_batch.nuclei.watershed import SobelConstants


@dataclass(frozen=True)
class Side:
    """One of the two. `settings`: of its inference, with `auto` as the machine has it; `random`: its weights are, so
    that its times are good and its nuclei are none."""

    name: str
    card: Card
    network: nn.Module
    settings: InferSettings
    random: bool = False

    @cached_property
    def predictor(self) -> Predictor:
        return Predictor(self.network, self.card, self.settings)

    def for_fields(self, side: int) -> Side:
        """The same for squares of `side` pixels that go one by one: a batch with no more tiles than they have."""
        return replace(self, settings=replace(self.settings, batch=batch_of(self.card, [(side, side)])))

    @property
    def constants(self) -> SobelConstants:
        return SobelConstants.from_json(self.card.sobel)


def side_of(name: str, said: str, settings: InferSettings) -> Side:
    """The side that a user names: `starter`, a package, a published checkpoint or its name.

    Raises PackageError where it cannot be had; `said` is what the message begins with.
    """
    path = Path(name)
    published = name in KINDS and not path.exists() and not cached_package(name).exists()
    if published or (path.is_file() and path.suffix in (".tar", ".pth")):
        try:
            network, card = read_checkpoint(name)
        except PackageError as error:
            if not published:
                raise
            raise PackageError(
                f"{said}: the weights {name} cannot be had ({error}). Fetch the checkpoint where there is a network "
                "(see https://github.com/vqdang/hover_net), and give the file: --teacher-weights FILE.tar; or compare "
                "costs alone, with random weights: --timing-only"
            ) from error
        return Side(name, card, network.eval().requires_grad_(False), settings)
    package = find_package(name, said)
    return Side(package.card.name, package.card, load_network(package), settings)


def random_teacher(name: str, settings: InferSettings) -> Side:
    """HoVerNet as published under `name`, with random weights. PackageError where no HoVerNet is."""
    kind = KINDS.get(name)
    if kind is None or not kind.architecture.startswith("hovernet-"):
        known = ", ".join(n for n, k in KINDS.items() if k.architecture.startswith("hovernet-"))
        raise PackageError(f"--teacher-weights {name}: with --timing-only give the name of an architecture: {known}")
    form = kind.architecture.removeprefix("hovernet-")
    arch = TeacherArch(form, kind.types)  # type: ignore[arg-type]  # the two forms that there are
    tile_in, tile_out = arch.tile
    card = Card(
        name=f"{name}, random weights",
        architecture=kind.architecture,
        encoder="",
        taxonomy=kind.taxonomy,
        mpp=0.25,
        tile_in=tile_in,
        tile_out=tile_out,
        sobel=find_package(str(STARTER)).card.sobel,
        licence="none",
    )
    return Side(card.name, card, build_teacher(arch).eval().requires_grad_(False), settings, random=True)

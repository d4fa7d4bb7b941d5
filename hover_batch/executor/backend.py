"""The backend that a run's settings ask for, with its resources settled before anything is written."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.record import Url
from hover_batch.config import Settings
from hover_batch.errors import InputError
from hover_batch.executor.local import LocalExecutor
from hover_batch.executor.resources import EnginePlan, Node, Resources, engine_plan
from hover_batch.executor.run_recorder import CohortBooks
from hover_batch.plan import PlannedSlide

if TYPE_CHECKING:  # it imports Ray, which must wait until the environment is set
    from hover_batch.executor.nodes import Machines

CLEARED_S = 30.0
"""Within which the machines of a cluster remove the copies of slides at the end of a run; the next run sweeps."""


@dataclass(frozen=True)
class Engine:
    """`settings`, with `auto` settled for the machines that will do the work, and `run`, which takes a cohort's
    slides to their ends, into the books."""

    settings: Settings
    run: Callable[[CohortBooks, Sequence[PlannedSlide]], None]


def settled_here(settings: Settings) -> Settings:
    """The settings with `auto` settled, unless that is for the machines of a cluster to say: see `engine`.

    InputError where a device cannot be used.
    """
    name = settings.infer.device
    if settings.engine.backend == "ray" and ":" in name:
        raise InputError(f"--device {name}: choose the GPU by CUDA_VISIBLE_DEVICES, and give --device cuda")
    if name == "auto" and (settings.engine.gpus == 0 or settings.infer.runtime == "openvino"):
        settings = replace(settings, infer=replace(settings.infer, device="cpu"))
    if settings.engine.address:
        return settings
    from hover_batch.model.predict import resolve

    return replace(settings, infer=resolve(settings.infer))


@contextlib.contextmanager
def engine(settings: Settings, layout: RunLayout, *, predicts: bool = True) -> Iterator[Engine]:
    """The engine for settings that are `settled_here`. A named cluster is joined at once, one of our own starts with
    the first slide.

    A run that `predicts` nothing has no networks, and `auto` is left as it is.

    InputError where more is asked for than there is, no cluster answers, or the output is not seen by all of it.
    """
    if settings.engine.backend == "local":
        yield Engine(settings, lambda books, slides: LocalExecutor(books).run(slides))
    elif settings.engine.address:
        from hover_batch.executor.cluster import joined, settled

        with joined(settings.engine.address, layout.ray_log):
            from hover_batch.executor.nodes import Machines

            machines = Machines()
            wanted = settings.engine.gpus
            if wanted <= 0 or not predicts:
                wanted = min(1, machines.resources.at_most(settings).gpus)
            if predicts:
                settings = replace(settings, infer=settled(settings.infer, on_gpu=wanted > 0))
                machines.look()
            machines.refuse_unshared(layout.root, wait=True)
            there = machines.resources.at_most(settings)
            plan = functools.partial(engine_plan, there, settings, predicts=predicts)
            yield Engine(settings, lambda books, slides: _run_on_ray(books, slides, plan(books.package.card), machines))
    else:
        resources = Resources((_this_node(settings),)).limited(settings)

        def run(books: CohortBooks, slides: Sequence[PlannedSlide]) -> None:
            if not slides:
                return
            from hover_batch.executor.cluster import started

            plan = engine_plan(resources, settings, books.package.card, predicts=predicts)
            books.progress.say("starting Ray on this machine, for this run alone, its token made for it …")
            with started(resources, layout.ray_log, plan.object_store_bytes):
                _run_on_ray(books, slides, plan)

        yield Engine(settings, run)


def _this_node(settings: Settings) -> Node:
    node = Node.here()
    if settings.infer.device == "cuda" and not node.gpus:  # torch knows ways to a GPU that have no device file
        import torch

        node = replace(node, gpus=torch.cuda.device_count())
    return node


def _run_on_ray(
    books: CohortBooks, slides: Sequence[PlannedSlide], plan: EnginePlan, machines: Machines | None = None
) -> None:
    from hover_batch.executor.ray import RayExecutor

    for line in plan.lines():
        books.progress.say(line)
    books.progress.say("loading libraries and the network, finding tissue: the first slide takes a while to begin …")
    copies = books.copies
    if machines:
        books.release = lambda slide_id: machines.on_each(functools.partial(copies.release, slide_id))
    try:
        RayExecutor(books, plan, machines=machines).run(slides)
    finally:
        if machines and any(isinstance(slide.record.path, Url) for slide in slides):
            machines.on_each(copies.close, wait_s=CLEARED_S)

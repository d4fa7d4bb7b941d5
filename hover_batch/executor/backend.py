"""The backend that a run's settings ask for, with its resources settled before anything is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.record import Url
from hover_batch.config import InferSettings, Settings
from hover_batch.errors import InputError
from hover_batch.executor.local import LocalExecutor
from hover_batch.executor.protocol import RunContext
from hover_batch.executor.resources import (
    EnginePlan,
    Node,
    Resources,
    engine_plan,
    in_process_line,
    runs_in_process,
)
from hover_batch.model.package import Package
from hover_batch.plan import PlannedSlide

if TYPE_CHECKING:  # it imports Ray, which must wait until the environment is set
    from hover_batch.executor.nodes import ClusterNodes

CLEANUP_S = 30.0
"""Time for the nodes of a cluster to remove copies of slides when a run ends; the next run removes what is left."""


def _auto_batch(package: Package, settings: InferSettings) -> int:
    from hover_batch.model.predict import auto_batch

    return auto_batch(package, settings)


@dataclass(frozen=True)
class OpenBackend:
    """Backend that is ready to run slides.

    `settings`: with `auto` resolved for the machines that do the work, except for the batch on a GPU. `run`: runs
    slides on them. `auto_batch`: returns the batch there for a package.
    """

    settings: Settings
    run: Callable[[RunContext, Sequence[PlannedSlide]], None]
    auto_batch: Callable[[Package, InferSettings], int] = _auto_batch


def settled_here(settings: Settings) -> Settings:
    """Return the settings with `auto` resolved for this machine.

    They are returned unchanged if they name a cluster, for which `open_backend` resolves them. InputError if a device
    cannot be used.
    """
    name = settings.infer.device
    if settings.engine.backend == "ray" and ":" in name:
        raise InputError(f"--device {name}: Ray chooses the GPU; set CUDA_VISIBLE_DEVICES and use --device cuda")
    if name == "auto" and (settings.engine.gpus == 0 or settings.infer.runtime == "openvino"):
        settings = replace(settings, infer=replace(settings.infer, device="cpu"))
    if settings.engine.address:
        return settings
    from hover_batch.model.predict import resolve

    return replace(settings, infer=resolve(settings.infer))


@contextlib.contextmanager
def open_backend(settings: Settings, layout: RunLayout, *, predicts: bool = True) -> Iterator[OpenBackend]:
    """Yield the backend for settings from `settled_here`, and close it when the block ends.

    A cluster that the settings name is joined at once; one of our own starts with the first slide. `layout`: the run's
    output folder. `predicts`: False for a run without networks, whose `auto` stays unresolved.

    InputError if the settings request more than is available, no cluster answers, or a node does not see the output
    folder.
    """
    if settings.engine.backend == "local":
        yield OpenBackend(settings, _run_in_process)
    elif settings.engine.address:
        from hover_batch.executor.cluster import auto_batch_there, joined, settled

        with joined(settings.engine.address, layout.ray_log):
            from hover_batch.executor.nodes import ClusterNodes

            nodes = ClusterNodes()
            wanted = settings.engine.gpus
            if wanted <= 0 or not predicts:
                wanted = min(1, nodes.resources.at_most(settings).gpus)
            if predicts:
                settings = replace(settings, infer=settled(settings.infer, on_gpu=wanted > 0))
                nodes.look()
            nodes.refuse_unshared(layout.root, wait=True)
            available = nodes.resources.at_most(settings)

            def run_on_cluster(context: RunContext, slides: Sequence[PlannedSlide]) -> None:
                plan = engine_plan(available, settings, context.package.card, predicts=predicts)
                _run_on_ray(context, slides, plan, nodes)

            yield OpenBackend(settings, run_on_cluster, auto_batch_there)
    else:
        resources = Resources((_this_node(settings),)).limited(settings)

        def run_on_this_machine(context: RunContext, slides: Sequence[PlannedSlide]) -> None:
            if not slides:
                return
            # A slide that was begun before may have crashed its process: only Ray survives that and quarantines it.
            if runs_in_process(settings.engine, slides) and not any(context.recorder.begun(slide) for slide in slides):
                context.recorder.progress.say(in_process_line(slides))
                return _run_in_process(context, slides)
            from hover_batch.executor.cluster import started

            plan = engine_plan(resources, settings, context.package.card, predicts=predicts)
            context.recorder.progress.say("starting Ray on this machine, for this run only …")
            with started(resources, layout.ray_log, plan.object_store_bytes, context.recorder.progress.warn):
                _run_on_ray(context, slides, plan)

        yield OpenBackend(settings, run_on_this_machine)


def _run_in_process(context: RunContext, slides: Sequence[PlannedSlide]) -> None:
    infer, cpus = context.settings.infer, context.settings.engine.cpus
    settings = replace(context.settings, infer=replace(infer, threads=infer.threads or cpus))
    LocalExecutor(replace(context, settings=settings)).run(slides)


def _this_node(settings: Settings) -> Node:
    node = Node.here()
    if settings.infer.device == "cuda" and not node.gpus:  # torch finds GPUs that have no device file
        import torch

        node = replace(node, gpus=torch.cuda.device_count())
    return node


def _run_on_ray(
    context: RunContext, slides: Sequence[PlannedSlide], plan: EnginePlan, nodes: ClusterNodes | None = None
) -> None:
    from hover_batch.executor.ray import RayExecutor

    progress = context.recorder.progress
    for line in plan.lines():
        progress.say(line)
    progress.say("loading libraries and the network, finding tissue: the first slide takes a while to begin …")
    try:
        RayExecutor(context, plan, nodes=nodes).run(slides)
    finally:
        if nodes and any(isinstance(slide.record.path, Url) for slide in slides):
            nodes.on_each(context.copies.close, wait_s=CLEANUP_S)

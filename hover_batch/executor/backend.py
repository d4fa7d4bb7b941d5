"""Open the backend that a run's settings request, and check its resources before anything is written."""

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
from hover_batch.model.card import Card
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
    """Backend that is ready to run slides."""

    settings: Settings
    """Settings of the run, with `auto` resolved for the nodes that do the work."""
    run: Callable[[RunContext, Sequence[PlannedSlide]], None]
    """Function that runs slides on these nodes, as `Executor.run` does; on this machine, it also starts and stops
    Ray."""
    auto_batch: Callable[[Package, InferSettings], int] = _auto_batch
    """Function that returns the batch size of `--batch auto` there, for a package and settings with AUTO_BATCH."""


def resolve_here(settings: Settings, card: Card) -> Settings:
    """Return the settings with device, precision, runtime and batch size `auto` resolved for this machine.

    If only torch can run the network, runtime `auto` becomes torch. If no GPUs are to be used or the runtime is
    openvino, device `auto` becomes cpu. For a cluster, nothing else is resolved here; `open_backend` resolves the rest
    on the cluster. On the CPU, an `auto` batch size is resolved, too; on a GPU, AUTO_BATCH remains (see
    `OpenBackend.auto_batch`).

    `card`: card of the network.

    InputError if the runtime cannot run the network, or the backend is ray and the device is one numbered GPU (such as
    cuda:1). Unless a cluster is to be joined, also InputError if this machine cannot use the device, or the device
    cannot be combined with the runtime or the precision.
    """
    settings = replace(settings, infer=card.supported(settings.infer))
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
    """Yield the backend for settings from `resolve_here`, and close it when the block ends.

    With backend local, slides run in this process. If the settings name a cluster, it is joined at once: Ray's
    environment variables are set and stay set, stdout is redirected to the run's ray.log, and the other `auto` settings
    are resolved. Otherwise, Ray starts on this machine once slides are run, unless the backend is auto and one process
    suffices for them (see `runs_in_process`).

    `layout`: paths of the run's results. `predicts`: False for a run without networks, whose `auto` settings are not
    resolved on a cluster.

    If Ray is to run on this machine, InputError if the settings request more than the machine has. For a cluster,
    InputError if none answers or it refuses the token, no node has a CPU core, or a node cannot use the device, cannot
    run hover-batch or does not see the output folder. OSError if the test file for this folder cannot be written,
    RayError if the process that resolves `auto` settings dies. The `run` of the backend raises the errors of
    `Executor.run` and, if it starts Ray, those of `cluster.started`.
    """
    if settings.engine.backend == "local":
        yield OpenBackend(settings, _run_in_process)
    elif settings.engine.address:
        from hover_batch.executor.cluster import auto_batch_there, joined, resolve_on_cluster

        with joined(settings.engine.address, layout.ray_log):
            from hover_batch.executor.nodes import ClusterNodes

            nodes = ClusterNodes()
            wanted = settings.engine.gpus
            if wanted <= 0 or not predicts:
                wanted = min(1, nodes.resources.at_most(settings).gpus)
            if predicts:
                settings = replace(settings, infer=resolve_on_cluster(settings.infer, on_gpu=wanted > 0))
                nodes.refresh()
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
            if runs_in_process(settings.engine, slides) and not any(
                context.recorder.was_begun(slide) for slide in slides
            ):
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

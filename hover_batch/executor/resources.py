"""Share a machine or a cluster among networks, readers and post-processing.

Nothing here imports Ray or torch, so that `plan` quickly shows what `segment` will use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hover_batch.config import EngineSettings, Settings
from hover_batch.errors import InputError
from hover_batch.formatting import counted
from hover_batch.model.card import Card

if TYPE_CHECKING:  # it imports the readers, and `doctor` also runs where one of their libraries is broken
    from hover_batch.plan import PlannedSlide

UNITS_AT_ONCE = 3
"""Units in progress per network: while one is predicted, another is read and a third is written."""
BLOCKS_AHEAD = 8
"""Blocks of 1024² pixels that are read ahead for each unit."""
CPU_THREADS = 4
"""Maximum threads per network on the CPU. More threads gain little; further cores get networks of their own."""
IN_PROCESS_TILES = 512
"""Tiles, 2 mm² at 0.25 µm, up to which `--backend auto` runs in one process: starting Ray takes longer."""
_BLOCK_BYTES = 4 << 20
"""Memory of one block, with its margins."""
_NETWORK_BYTES = 2 << 30
"""Memory of a process with a network on the CPU, including libraries and the activations of a batch."""
_POST_BYTES_PER_PIXEL = 64
"""Peak memory of post-processing per pixel of a region, in addition to the stored planes."""


@dataclass(frozen=True)
class Node:
    """What a run may use of one machine."""

    cpus: int
    """Number of CPU cores."""
    gpus: int
    """Number of GPUs."""
    memory: int
    """Memory in bytes."""

    @classmethod
    def here(cls) -> Node:
        """Return the CPU cores, GPUs and memory that this process may use of this machine.

        CPU affinity, the control group and CUDA_VISIBLE_DEVICES are respected. Only NVIDIA GPUs are counted, by their
        device files.
        """
        return cls(_cpus(), _visible_gpus(), _memory())


@dataclass(frozen=True)
class Resources:
    """Nodes that a run may use."""

    nodes: tuple[Node, ...]
    """Nodes, with what may be used of each."""

    @property
    def cpus(self) -> int:
        """Number of CPU cores of all nodes together."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """Number of GPUs of all nodes together."""
        return sum(node.gpus for node in self.nodes)

    def limited(self, settings: Settings) -> Resources:
        """Return the CPU cores and GPUs that the settings request, taken from the nodes in order.

        Without `--cpus` or `--gpus`, all are taken; with device cpu, no GPUs. Nodes of which nothing is taken are left
        out. The others keep all their memory.

        `settings`: settings of the run.

        InputError if `--cpus` or `--gpus` is more than the nodes have.
        """
        engine = settings.engine
        if engine.cpus > self.cpus:
            raise InputError(
                f"--cpus {engine.cpus}: only {self.cpus} are available; give a smaller number or leave it out"
            )
        if engine.gpus > self.gpus:
            raise InputError(
                f"--gpus {engine.gpus}: only {self.gpus} are available; leave it out, or check with hover-batch doctor "
                "that torch finds the others"
            )
        return self.at_most(settings)

    def at_most(self, settings: Settings) -> Resources:
        """Return the CPU cores and GPUs that the settings request, or all of them if fewer are available.

        `limited` takes them from the nodes in the same way. Use it for a cluster, to which nodes may still be added.

        `settings`: settings of the run.
        """
        engine = settings.engine
        cpus_left = engine.cpus or self.cpus
        gpus_left = self.gpus if engine.gpus < 0 else engine.gpus
        if settings.infer.device == "cpu":
            gpus_left = 0
        nodes = []
        for node in self.nodes:
            cpus, gpus = min(node.cpus, cpus_left), min(node.gpus, gpus_left)
            cpus_left -= cpus
            gpus_left -= gpus
            if cpus or gpus:
                nodes.append(Node(cpus, gpus, node.memory))
        return Resources(tuple(nodes))


@dataclass(frozen=True)
class EnginePlan:
    """Distribution of a run's CPU cores, GPUs and memory. Numbers are totals over all nodes unless noted."""

    resources: Resources
    """Nodes of the run."""
    networks: int
    """Number of networks, each on a GPU of its own or on the CPU; 0 for a run that makes new tables from stored
    predictions."""
    network_gpus: int
    """GPUs reserved for each network: 1, or 0 on the CPU."""
    network_cpus: int
    """CPU cores reserved for each network."""
    threads: int
    """Threads of each network on the CPU."""
    units_at_once: int
    """Maximum number of units in progress per network."""
    slots: int
    """CPU cores that read, post-process and finalize."""
    regions_at_once: int
    """Maximum number of tasks in progress that post-process a region or finalize a slide.

    Memory limits it. On nodes with two free cores or more, it leaves one of them to readers."""
    halvings: int = 0
    """How often `regions_at_once` and `units_at_once` were halved because memory ran out."""

    @property
    def object_store_bytes(self) -> int:
        """Size of Ray's object store in bytes.

        It is twice the size of the blocks that all networks read ahead, plus 512 MiB for masks and results.
        """
        return (512 << 20) + 2 * self.networks * self.units_at_once * BLOCKS_AHEAD * _BLOCK_BYTES

    def halved(self) -> EnginePlan | None:
        """Return the plan with `regions_at_once` and `units_at_once` halved (rounded up); None if both are 1.

        `halvings` counts one more; all else stays.
        """
        if self.regions_at_once == self.units_at_once == 1:
            return None
        return replace(
            self,
            regions_at_once=-(-self.regions_at_once // 2),
            units_at_once=-(-self.units_at_once // 2),
            halvings=self.halvings + 1,
        )

    def lines(self) -> list[str]:
        """Return the plan as lines of text for the user. ValueError if it has no nodes."""
        nodes = self.resources.nodes
        cores = f"cores: {self.resources.cpus}, GPUs: {self.resources.gpus}"
        least_memory = f"{min(node.memory for node in nodes) / 2**30:.0f} GiB"
        if len(nodes) > 1:
            available = f"resources: {len(nodes)} nodes, {cores}, memory of the smallest node: {least_memory}"
        else:
            available = f"resources: {cores}, memory: {least_memory}"
        if not self.networks:
            return [available, f"  no network; cores for post-processing: {self.regions_at_once}"]
        devices = "one GPU each" if self.network_gpus else f"on the CPU, threads each: {self.threads}"
        return [
            available,
            f"  networks: {self.networks} ({devices}), units (large squares of a slide) at once per "
            f"network: {self.units_at_once}; "
            f"cores for reading and post-processing: {self.slots}, of which at most "
            f"{self.regions_at_once} post-process",
        ]


def engine_plan(
    resources: Resources, settings: Settings, card: Card, *, predicts: bool = True, previous: EnginePlan | None = None
) -> EnginePlan:
    """Return a plan that shares `resources` among networks, readers and post-processing.

    Each node is shared separately. Unless `predicts` is False, the plan has at least one network; on GPUs, it has at
    least as many as the settings request, even if the cluster does not have the GPUs yet.

    A network on the CPU reserves its threads, but never the last core of a node, since it would wait forever for
    readers. It may still compute on that core, which readers leave mostly idle. A quarter of a node's memory is for
    units in progress, a quarter for regions in post-processing, and the rest for networks, tables and the system.

    `settings`: settings in effect. `card`: card of the model, whose number of planes determines the memory of a unit.
    `predicts`: False for a run without networks, which makes new tables from stored predictions. `previous`: plan of a
    run in progress whose nodes have changed; None for a new run. The new plan keeps its halvings and the size of its
    networks, and only changes their number.

    ValueError if there are no nodes.
    """
    side = settings.infer.unit
    unit_bytes = card.layout.planes * side**2 + BLOCKS_AHEAD * _BLOCK_BYTES
    region_bytes = (card.layout.planes + _POST_BYTES_PER_PIXEL) * (side + 2 * settings.post.halo) ** 2
    on_gpus = previous.network_gpus > 0 if previous else resources.gpus > 0
    fewest_cpus = min(node.cpus for node in resources.nodes)
    threads = settings.infer.threads or max(1, min(CPU_THREADS, fewest_cpus))
    # All networks reserve the same number: at most what the smallest node can spare.
    network_cpus = 0 if on_gpus or not predicts else min(threads, fewest_cpus - 1)
    units_at_once, halvings = UNITS_AT_ONCE, 0
    if previous:
        threads, network_cpus, units_at_once = previous.threads, previous.network_cpus, previous.units_at_once
        halvings = previous.halvings
    networks = regions_at_once = slots = 0
    for node in resources.nodes:
        if not predicts:
            here = 0
        elif on_gpus:
            here = node.gpus
        else:
            memory_allows = max(1, node.memory // 2 // _NETWORK_BYTES)
            cpus_allow = max(1, node.cpus - 1) if network_cpus == 0 else (node.cpus - 1) // network_cpus
            here = min(memory_allows, cpus_allow)
        free_cpus = node.cpus - here * network_cpus
        post_cpus = free_cpus - 1 if predicts else free_cpus
        networks += here
        slots += free_cpus
        regions_at_once += max(1, min(post_cpus, node.memory // 4 // region_bytes))
        if here:
            units_at_once = max(1, min(units_at_once, node.memory // 4 // (here * unit_bytes)))
    # If no node has room for a network now, it waits for one that has.
    least_networks = max(1, settings.engine.gpus if on_gpus else 1)
    return EnginePlan(
        resources=resources,
        networks=max(networks, least_networks) if predicts else 0,
        network_gpus=int(on_gpus),
        network_cpus=network_cpus,
        threads=threads,
        units_at_once=units_at_once,
        slots=slots,
        regions_at_once=-(-regions_at_once // 2**halvings),
        halvings=halvings,
    )


def runs_in_process(engine: EngineSettings, slides: Sequence[PlannedSlide]) -> bool:
    """Return whether the backend is auto and the slides have so few tiles that one process suffices.

    All slides together must have at most IN_PROCESS_TILES tiles. False if a cluster is to be joined, or a slide is in
    cloud storage, since its number of tiles is unknown. Even if the result is True, a run uses Ray if one of its slides
    was begun before, because the slide may have crashed its process.

    `engine`: settings of the backend. `slides`: slides still to be processed.
    """
    if engine.backend != "auto" or engine.address or not all(slide.grid for slide in slides):
        return False
    return sum(slide.tiles for slide in slides) <= IN_PROCESS_TILES


def in_process_line(slides: Sequence[PlannedSlide]) -> str:
    """Return the line for the user that says why `--backend auto` processes `slides` in one process, without Ray."""
    tiles = sum(slide.tiles for slide in slides)
    return f"backend: one process, because Ray would take longer to start than {counted(tiles, 'tile')} take (auto)"


def resource_lines(settings: Settings, card: Card, slides: Sequence[PlannedSlide]) -> list[str]:
    """Return lines of text about the resources that `segment` will use, as far as they are known without Ray or torch.

    The resources of a cluster are not checked. The lines do not consider that `segment` uses Ray if one of the slides
    was begun before.

    `settings`: settings in effect. `card`: card of the model. `slides`: slides of the cohort, whose tiles decide
    whether Ray is used.

    InputError if Ray is to run on this machine and the settings request more than it has.
    """
    engine = settings.engine
    reason = [in_process_line(slides)] if runs_in_process(engine, slides) else []
    if engine.backend == "local" or reason:
        return [
            *reason,
            f"resources: one process; threads of the network: {settings.infer.threads or engine.cpus or _cpus()}",
        ]
    if engine.address:
        return [f"resources: those of the Ray cluster at {engine.address}, which are known once the run joins it"]
    return engine_plan(Resources((Node.here(),)).limited(settings), settings, card).lines()


def _visible_gpus() -> int:
    """Return the number of NVIDIA GPUs that this process may use, without torch, which takes seconds to import."""
    devices = [p for p in Path("/dev").glob("nvidia*") if p.name.removeprefix("nvidia").isdigit()]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(devices)
    return min(len(devices), len([name for name in chosen.split(",") if name.strip() not in ("", "-1")]))


def _cpus() -> int:
    """Return the number of cores that this process may use, by its CPU affinity and its control group."""
    bound = len(os.sched_getaffinity(0))
    quota, _, period = _control_group("cpu.max").partition(" ")
    return max(1, min(bound, int(quota) // int(period))) if quota.isdigit() else bound


def _memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or fewer by its control group."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _control_group("memory.max")
    return min(whole, int(limit)) if limit.isdigit() else whole


def _control_group(name: str) -> str:
    """Return the content of a file of this process's control group; empty if there is none."""
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""

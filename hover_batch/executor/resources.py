"""What a run asks of a machine or a cluster: how many copies of the network, on what, and who keeps them fed.

Nothing here imports Ray or torch, so that `plan` shows what `segment` will ask for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hover_batch.config import Settings
from hover_batch.errors import InputError
from hover_batch.model.package import Card

MAX_STRIKES = 2
"""Deaths of processes that a piece of work may cause; an innocent one passes when it is tried again."""
UNITS_AT_ONCE = 3
"""Units that one network has under way: while one is predicted, another is read and a third is written."""
BLOCKS_AHEAD = 8
"""Blocks of 1024² pixels, with margins some 4 MB each, that are read ahead for each unit."""
CPU_THREADS = 4
"""Of a network on the CPU: more of them gain little, and more copies of the network run instead."""
_BLOCK_BYTES = 4 << 20
_NETWORK_BYTES = 2 << 30
"""What a process with a network on the CPU holds, libraries and activations of a batch among it."""
_POST_BYTES_PER_PIXEL = 64
"""Beside the stored planes: what post-processing holds for each pixel of a region at its peak."""


@dataclass(frozen=True)
class Node:
    """One machine: its cores, its GPUs and the bytes of memory that may be used of it."""

    cpus: int
    gpus: int
    memory: int

    @classmethod
    def here(cls) -> Node:
        """This machine: the cores and the memory that this process may use, the GPUs that it may see."""
        return cls(_cpus(), _visible_gpus(), _memory())


@dataclass(frozen=True)
class Resources:
    """The machines that a run may use."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)

    def limited(self, settings: Settings) -> Resources:
        """What of them a run uses, the first machines first. InputError where it asks for more than there is."""
        engine = settings.engine
        if engine.cpus > self.cpus:
            raise InputError(f"--cpus {engine.cpus}: there are {self.cpus}")
        if engine.gpus > self.gpus:
            raise InputError(f"--gpus {engine.gpus}: there are {self.gpus}; leave it out, or see that torch finds them")
        return self.at_most(settings)

    def at_most(self, settings: Settings) -> Resources:
        """`limited` of a cluster that may grow: what is asked for beyond what is there may still come."""
        engine = settings.engine
        on_cpu = settings.infer.device == "cpu"
        cpus_left = engine.cpus or self.cpus
        gpus_left = 0 if on_cpu else self.gpus if engine.gpus < 0 else engine.gpus
        nodes = []
        for node in self.nodes:
            cpus, gpus = min(node.cpus, cpus_left), min(node.gpus, gpus_left)
            cpus_left, gpus_left = cpus_left - cpus, gpus_left - gpus
            if cpus or gpus:
                nodes.append(Node(cpus, gpus, node.memory))
        return Resources(tuple(nodes))


@dataclass(frozen=True)
class EnginePlan:
    """How a run uses what it has.

    `actors` networks, each on a GPU of its own or on the CPU with `threads` threads and `actor_cpus` reserved for it.
    `units_at_once` for each of them; `slots` cores that read, post-process and finalize, of which post-processing and
    finalizing take `posts` at most, so that readers always have one where there are two. A run that makes new tables of
    kept predictions has no actors.
    """

    resources: Resources
    actors: int
    actor_gpus: int
    actor_cpus: int
    threads: int
    units_at_once: int
    slots: int
    posts: int

    @property
    def object_store_bytes(self) -> int:
        """Room for the blocks that are read ahead, and as much again for masks and what is being handed over."""
        return (512 << 20) + 2 * self.actors * self.units_at_once * BLOCKS_AHEAD * _BLOCK_BYTES

    def lines(self) -> list[str]:
        """The plan in words."""
        machines = len(self.resources.nodes)
        memory = min(node.memory for node in self.resources.nodes) / 2**30
        there = (
            f"resources: {machines} machine{'s' if machines > 1 else ''}, cores: {self.resources.cpus}, "
            f"GPUs: {self.resources.gpus}, memory: {memory:.0f} GiB"
        )
        if not self.actors:
            return [there, f"  no network; cores that post-process: {self.posts}"]
        on = "a GPU each" if self.actor_gpus else f"on the CPU, threads each: {self.threads}"
        return [
            there,
            f"  networks: {self.actors} ({on}), units at once for each: {self.units_at_once}; "
            f"cores that read and post-process: {self.slots}, of them post-processing at most: {self.posts}",
        ]


def engine_plan(
    resources: Resources, settings: Settings, card: Card, *, predicts: bool = True, begun: EnginePlan | None = None
) -> EnginePlan:
    """Share out `resources`, each machine by itself; among networks too, where the run `predicts`. Of GPUs as many as
    the settings ask for, also those that a cluster has yet to bring. `begun`: the plan of a run that is under way, on
    machines that came or went: its networks stay as they are, only their number changes.

    A network on the CPU reserves its threads, but never the last core of a machine: it would wait for readers for
    ever. It may compute on that one, too, for they leave most of it; on a single core they take turns. Half of a
    machine's memory is for the units under way and the regions in post-processing; networks, tables and the system
    have the rest.
    """
    side = settings.infer.unit
    unit = card.layout.planes * side**2 + BLOCKS_AHEAD * _BLOCK_BYTES
    region = (card.layout.planes + _POST_BYTES_PER_PIXEL) * (side + 2 * settings.post.halo) ** 2
    on_gpus = begun.actor_gpus > 0 if begun else resources.gpus > 0
    smallest = min(node.cpus for node in resources.nodes)
    threads = settings.infer.threads or max(1, min(CPU_THREADS, smallest))
    # What one network reserves is the same on all machines, hence what the smallest can spare.
    actor_cpus = 0 if on_gpus or not predicts else min(threads, smallest - 1)
    units_at_once = UNITS_AT_ONCE
    if begun:
        threads, actor_cpus, units_at_once = begun.threads, begun.actor_cpus, begun.units_at_once
    actors = posts = slots = 0
    for node in resources.nodes:
        if not predicts:
            networks = 0
        elif on_gpus:
            networks = node.gpus
        else:
            fit = max(1, node.memory // 2 // _NETWORK_BYTES)
            spared = max(1, node.cpus - 1) if actor_cpus == 0 else (node.cpus - 1) // actor_cpus
            networks = min(fit, spared)
        free = node.cpus - networks * actor_cpus
        actors, slots = actors + networks, slots + free
        posts += max(1, min(free - 1 if predicts else free, node.memory // 4 // region))
        if networks:
            units_at_once = max(1, min(units_at_once, node.memory // 4 // (networks * unit)))
    # One at least: where no machine has room for it now, it waits for one.
    wanted = max(1, settings.engine.gpus if on_gpus else 1)
    return EnginePlan(
        resources=resources,
        actors=max(actors, wanted) if predicts else 0,
        actor_gpus=int(on_gpus),
        actor_cpus=actor_cpus,
        threads=threads,
        units_at_once=units_at_once,
        slots=slots,
        posts=posts,
    )


def resource_lines(settings: Settings, card: Card) -> list[str]:
    """What `segment` will ask for, in words, as far as it can be told without importing Ray or torch."""
    engine = settings.engine
    if engine.backend == "local":
        return [f"resources: one process, with the network's threads: {settings.infer.threads or _cpus()}"]
    if engine.address:
        return [f"resources: of the Ray cluster at {engine.address}, seen when it is joined"]
    return engine_plan(Resources((Node.here(),)).limited(settings), settings, card).lines()


def _visible_gpus() -> int:
    """NVIDIA GPUs that a process started here sees, without asking torch, which takes seconds to import."""
    there = [p for p in Path("/dev").glob("nvidia*") if p.name.removeprefix("nvidia").isdigit()]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(there)
    return min(len(there), len([name for name in chosen.split(",") if name.strip() not in ("", "-1")]))


def _cpus() -> int:
    """Cores that this process may use: those it is bound to, or the share that its control group allows."""
    bound = len(os.sched_getaffinity(0))
    quota, _, period = _control_group("cpu.max").partition(" ")
    return max(1, min(bound, int(quota) // int(period))) if quota.isdigit() else bound


def _memory() -> int:
    """Bytes that this process may use: the machine's, or its control group's where that has less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _control_group("memory.max")
    return min(whole, int(limit)) if limit.isdigit() else whole


def _control_group(name: str) -> str:
    try:
        return Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""

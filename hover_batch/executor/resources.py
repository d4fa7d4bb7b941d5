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
_BLOCK_BYTES = 4 << 20
_POST_BYTES_PER_PIXEL = 64
"""Beside the stored planes: what post-processing holds for each pixel of a region at its peak."""
_MEMORY_SHARE = 0.5
"""Of a machine's memory that units and regions under way may take; networks, tables and the system have the rest."""


@dataclass(frozen=True)
class Resources:
    """What there is. `memory`: bytes, of the smallest machine."""

    cpus: int
    gpus: int
    memory: int

    @classmethod
    def here(cls) -> Resources:
        """Of this machine: the cores and the memory that this process may use, the GPUs that it may see."""
        return cls(len(os.sched_getaffinity(0)), _visible_gpus(), _memory())

    def limited(self, settings: Settings) -> Resources:
        """What of it a run uses. InputError where it asks for more than there is."""
        engine = settings.engine
        if engine.cpus > self.cpus:
            raise InputError(f"--cpus {engine.cpus}: there are {self.cpus}")
        if engine.gpus > self.gpus:
            raise InputError(f"--gpus {engine.gpus}: there are {self.gpus}; leave it out, or see that torch finds them")
        on_cpu = settings.infer.device == "cpu"
        gpus = 0 if on_cpu else self.gpus if engine.gpus < 0 else engine.gpus
        return Resources(engine.cpus or self.cpus, gpus, self.memory)


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
        if not self.actors:
            return [f"resources: no network; {self.slots} cores, at most {self.posts} of them post-processing"]
        on = "GPU" if self.actor_gpus else f"CPU, {self.threads} threads each"
        return [
            f"resources: {self.resources.cpus} cores, {self.resources.gpus} GPUs, "
            f"{self.resources.memory / 2**30:.0f} GiB of memory",
            f"  {self.actors} × network ({on}), {self.units_at_once} units at once for each; "
            f"{self.slots} cores to read and post-process, at most {self.posts} of them post-processing",
        ]


def engine_plan(resources: Resources, settings: Settings, card: Card, *, predicts: bool = True) -> EnginePlan:
    """Share out `resources`; among networks too, where the run `predicts`.

    A network on the CPU reserves its threads, but never the last core: it would wait for readers for ever. Where
    there is one core only, it reserves none and takes turns with them.
    """
    cpus, threads = resources.cpus, settings.infer.network_threads
    if not predicts:
        actors, actor_cpus = 0, 0
    elif resources.gpus:
        actors, actor_cpus = resources.gpus, 0
    else:
        actor_cpus = min(threads, cpus - 1)
        actors = max(1, (cpus - 1) // max(1, actor_cpus))
    slots = cpus - actors * actor_cpus
    side = settings.infer.unit
    unit = card.layout.planes * side**2 + BLOCKS_AHEAD * _BLOCK_BYTES
    region = (card.layout.planes + _POST_BYTES_PER_PIXEL) * (side + 2 * settings.post.halo) ** 2
    budget = int(resources.memory * _MEMORY_SHARE)
    units_at_once = max(1, min(UNITS_AT_ONCE, budget // 2 // (max(1, actors) * unit)))
    posts = max(1, min(slots - 1 if predicts else slots, budget // 2 // region))
    return EnginePlan(
        resources=resources,
        actors=actors,
        actor_gpus=1 if resources.gpus else 0,
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
        return [f"resources: one process, {settings.infer.network_threads} threads of the network on the CPU"]
    if engine.address:
        return [f"resources: of the Ray cluster at {engine.address}, seen when it is joined"]
    return engine_plan(Resources.here().limited(settings), settings, card).lines()


def _visible_gpus() -> int:
    """NVIDIA GPUs that a process started here sees, without asking torch, which takes seconds to import."""
    there = [p for p in Path("/dev").glob("nvidia*") if p.name.removeprefix("nvidia").isdigit()]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(there)
    return min(len(there), len([name for name in chosen.split(",") if name.strip() not in ("", "-1")]))


def _memory() -> int:
    """Bytes that this process may use: the machine's, or its control group's where that has less."""
    bytes_here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return bytes_here
    return min(bytes_here, int(limit)) if limit.isdigit() else bytes_here

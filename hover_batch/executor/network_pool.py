"""The networks of a run: as many as its plan says, each in an actor, replaced where they die.

Import this after `hover_batch.executor.cluster` has been entered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ray

from hover_batch.executor.resources import EnginePlan
from hover_batch.executor.run_recorder import CohortBooks, Load
from hover_batch.executor.workers import InferActor


@dataclass(eq=False)
class Network:
    """One network. `node`: the machine it is on, once known; `lost_before`: machines that had gone when it was hired;
    `load`: units under way in it; `alone`: the one under way
    must have no company; `gone`: dead, or let go by us, which is no fault of the units in it (`let_go`)."""

    handle: Any
    node: str = ""
    lost_before: int = 0
    started: bool = False
    gone: bool = False
    let_go: bool = False
    load: int = 0
    alone: bool = False


class NetworkPool:
    """The networks, and who is free."""

    def __init__(self, books: CohortBooks, load: Load) -> None:
        self._books = books
        self._load = load
        self.networks: list[Network] = []

    def __len__(self) -> int:
        return len(self.networks)

    @property
    def started(self) -> list[Network]:
        return [network for network in self.networks if network.started]

    def start(self, plan: EnginePlan, lost_before: int) -> Network:
        """One more, on its way: Ray makes it where there is room. `lost_before`: machines that have gone so far."""
        options = InferActor.options(  # type: ignore[attr-defined]  # what ray.remote makes of a class
            num_cpus=plan.actor_cpus,
            num_gpus=plan.actor_gpus,
            max_concurrency=plan.units_at_once,
            scheduling_strategy="SPREAD",
        )
        # Said to torch, since an OMP_NUM_THREADS of the user's would hold instead of what is reserved.
        settings = replace(self._books.settings.infer, threads=plan.threads)
        handle = options.remote(self._books.package, settings, self._load)
        network = Network(handle, lost_before=lost_before)
        self.networks.append(network)
        return network

    def idle(self) -> Network | None:
        """One that nothing is under way in."""
        return next((network for network in self.started if network.load == 0), None)

    def freest(self, at_once: int, spared: Network | None) -> Network | None:
        """The one with the least under way, and less than `at_once`; neither `spared` nor one that must be left
        alone."""
        free = [n for n in self.started if not n.alone and n is not spared and n.load < at_once]
        return min(free, key=lambda network: network.load, default=None)

    def least_loaded(self) -> Network | None:
        return min(self.started, key=lambda network: network.load, default=None)

    def lost(self, network: Network) -> None:
        """It died."""
        network.gone = True
        if network in self.networks:
            self.networks.remove(network)

    def stop(self, network: Network) -> None:
        """End it. What was under way in it comes back as dead, and is done by another."""
        network.let_go = True
        self.lost(network)
        ray.kill(network.handle)

    def shrink(self, most: int) -> None:
        """Let go of those beyond `most`: first who has not started, then who has least to do."""
        by_use = sorted(self.networks, key=lambda network: (network.started, network.load))
        for network in by_use[: max(0, len(by_use) - most)]:
            self.stop(network)

    def close(self) -> None:
        """The run is over."""
        for network in self.networks:
            ray.kill(network.handle)

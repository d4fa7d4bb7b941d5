"""The networks of a run: as many as its plan says, each in an actor, replaced when they die.

Import this after `hover_batch.executor.cluster` has been entered.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, OutOfMemoryError, RayActorError, RayError

from hover_batch.config import InferSettings
from hover_batch.errors import HoverBatchError, PackageError
from hover_batch.executor.faults import WorkerDied, cause_of
from hover_batch.executor.nodes import NOTICED_S, ClusterNodes
from hover_batch.executor.protocol import LoadNetwork
from hover_batch.executor.resources import EnginePlan
from hover_batch.executor.slide_state import Verdict
from hover_batch.executor.workers import InferActor
from hover_batch.model.package import Package

MAX_FAILED_STARTS = 3
"""Networks that may die one after the other while they load, before the run gives up."""


@dataclass(eq=False)
class Network:
    """Network in an actor.

    `handle`: the actor. `node`: id of its node, empty until it is known. `ready`: whether it has loaded. `load`: number
    of units in progress in it. `alone`: whether its only unit must run alone.
    """

    handle: Any
    nodes_lost_before: int
    """Nodes that the cluster had lost when it was started."""
    node: str = ""
    ready: bool = False
    load: int = 0
    alone: bool = False
    stopped: bool = False
    """By `NetworkPool.stop`, so that the units in it are not to blame."""
    silent_until: float = 0.0
    """When (monotonic) a network that does not answer is taken for dead."""


class NetworkPool:
    """Networks that are loading or ready. `load`: loads a network. `nodes`: nodes of a joined cluster, or None."""

    def __init__(
        self, package: Package, settings: InferSettings, load: LoadNetwork, nodes: ClusterNodes | None
    ) -> None:
        self._package = package
        self._settings = settings
        self._load = load
        self._nodes = nodes
        self._networks: list[Network] = []
        self._failed_starts = 0

    def __len__(self) -> int:
        return len(self._networks)

    @property
    def ready(self) -> list[Network]:
        """Networks that have loaded."""
        return [network for network in self._networks if network.ready]

    def least_loaded(self) -> Network | None:
        """Return the ready network with the fewest units in progress, or None if no network is ready."""
        return min(self.ready, key=lambda network: network.load, default=None)

    def freest(self, at_once: int, spared: Network | None = None) -> Network | None:
        """Return the least loaded ready network with fewer than `at_once` units, or None.

        Networks in which a unit must run alone, and the network `spared`, are excluded.
        """
        free = [n for n in self.ready if not n.alone and n is not spared and n.load < at_once]
        return min(free, key=lambda network: network.load, default=None)

    def start(self, plan: EnginePlan) -> Network:
        """Start a network and return it. Ray places it on a node with enough free resources.

        It is not ready yet: call its `where` and `start`, and then `started`.
        """
        options = InferActor.options(  # type: ignore[attr-defined]  # what ray.remote makes of a class
            num_cpus=plan.actor_cpus,
            num_gpus=plan.actor_gpus,
            max_concurrency=plan.units_at_once,
            scheduling_strategy="SPREAD",
        )
        # Given to torch explicitly: an OMP_NUM_THREADS of the user's would override the reserved number.
        settings = replace(self._settings, threads=plan.threads)
        handle = options.remote(self._package, settings, self._load)
        network = Network(handle, self._nodes.lost if self._nodes else 0)
        self._networks.append(network)
        return network

    def started(self, network: Network) -> None:
        """Mark a network as ready, because it has loaded."""
        network.ready = True
        self._failed_starts = 0

    def died(self, network: Network, error: RayError) -> Verdict | None:
        """Remove a network whose process died with `error`. Return the verdict on the units in progress in it.

        None if it is not known yet whether its process, its node or only the connection is lost: then call
        `verdict_on_silent` until it returns a verdict.
        """
        self._remove(network)
        if network.stopped:
            return Verdict.RETRY
        if isinstance(error, OutOfMemoryError):
            return Verdict.SHORT_OF_MEMORY
        if isinstance(error, ActorUnavailableError) and self._nodes:
            network.silent_until = network.silent_until or time.monotonic() + NOTICED_S
            return None
        return self._verdict_on_dead(network)

    def verdict_on_silent(self, network: Network) -> Verdict | None:
        """Return the verdict on the units in progress in a network that does not answer; None if still unknown."""
        if time.monotonic() < network.silent_until and self._node_is_up(network):
            return None
        return self._verdict_on_dead(network)

    def _verdict_on_dead(self, network: Network) -> Verdict:
        ray.kill(network.handle)  # in case it lives after all
        if self._nodes:
            self._nodes.look()
        return Verdict.STRIKE if self._node_is_up(network) else Verdict.NODE_LOST

    def _node_is_up(self, network: Network) -> bool:
        if self._nodes is None:
            return True
        if not network.node:  # not known yet: any node lost since it was started may have been its own
            return self._nodes.lost == network.nodes_lost_before
        return self._nodes.is_up(network.node)

    def died_loading(self, verdict: Verdict, error: RayError) -> None:
        """Count a network that died while it was loading, unless its node was lost or it was stopped.

        HoverBatchError if this happens MAX_FAILED_STARTS times in a row.
        """
        if verdict in (Verdict.RETRY, Verdict.NODE_LOST):
            return
        self._failed_starts += 1
        if self._failed_starts == MAX_FAILED_STARTS:
            raise HoverBatchError(
                f"the process of the model died {MAX_FAILED_STARTS} times in a row while it was loading "
                f"({type(error).__name__}); memory may be too small: use fewer --cpus or --gpus"
            )

    def stop(self, network: Network) -> None:
        """Stop a network and remove it from the pool, if it is still there.

        Its units are retried in another network, without blame.
        """
        if network in self._networks:
            network.stopped = True
            self._remove(network)
            ray.kill(network.handle)

    def adapt(self, most: int) -> None:
        """Reduce the pool to at most `most` networks.

        Networks on lost nodes are removed first. Then networks that are still loading are stopped, and then the least
        loaded.
        """
        for network in [n for n in self._networks if not self._node_is_up(n)]:
            self._remove(network)  # its units come back by themselves
        by_use = sorted(self._networks, key=lambda network: (network.ready, network.load))
        for network in by_use[: max(0, len(by_use) - most)]:
            self.stop(network)

    def close(self) -> None:
        """Kill the processes of all networks."""
        for network in self._networks:
            ray.kill(network.handle)

    def _remove(self, network: Network) -> None:
        if network in self._networks:
            self._networks.remove(network)


def is_death(error: RayError) -> bool:
    """Return whether the error of a call to a network means that the network's process is dead."""
    return isinstance(error, RayActorError | OutOfMemoryError)


def load_error(error: RayError) -> HoverBatchError:
    """Return the error that stops the run when a network could not be loaded although its process is alive.

    It is the PackageError that the network raised, or else a HoverBatchError with the cause.
    """
    cause = cause_of(error)
    if isinstance(cause, PackageError):
        return cause
    if isinstance(cause, WorkerDied):
        return HoverBatchError(f"Ray cannot start a process for the model: {error}")
    return HoverBatchError(f"the model cannot be loaded: {cause}\n{error}")

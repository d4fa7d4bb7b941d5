"""Networks of a run on Ray, each in an actor, replaced when they die.

It imports Ray, so import it inside `cluster.started` or `cluster.joined`, which set Ray's environment.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayActorError, RayError

from hover_batch.config import InferSettings
from hover_batch.errors import HoverBatchError, PackageError
from hover_batch.executor.faults import NetworkStopped, WorkerDied, cause_of, verdict_on
from hover_batch.executor.nodes import NOTICED_S, ClusterNodes
from hover_batch.executor.protocol import LoadNetwork
from hover_batch.executor.resources import EnginePlan
from hover_batch.executor.slide_state import Verdict
from hover_batch.executor.workers import InferActor
from hover_batch.model.package import Package

MAX_FAILED_STARTS = 3
"""Number of networks that die while they load, without one that loads in between, at which the run stops."""
MAX_LOST_STARTS = 20
"""The same for networks whose nodes are lost: a lost node with eight GPUs counts eight times."""


@dataclass(eq=False)
class Network:
    """Network in an actor."""

    handle: Any
    """Handle of the actor."""
    nodes_lost_before: int
    """`ClusterNodes.nodes_lost` when the network was started; 0 without a joined cluster."""
    node: str = ""
    """Id of its node; empty until it is known."""
    ready: bool = False
    """Whether it has loaded."""
    units: int = 0
    """Number of units in progress in it."""
    alone: bool = False
    """Whether its only unit must run alone."""
    stopped: bool = False
    """Whether `NetworkPool.stop` stopped it, so that its units are not to blame."""
    presumed_dead_at: float = 0.0
    """Monotonic time in seconds from which it counts as dead; 0 while it can be reached."""


class NetworkPool:
    """Networks of a run that are loading or ready; `len` gives their number. Use it from one thread.

    `package`, `settings`: passed to `load`, the function that loads a network. `nodes`: nodes of a joined cluster; None
    on this machine. `warn`: shows a line to the user.
    """

    def __init__(
        self,
        package: Package,
        settings: InferSettings,
        load: LoadNetwork,
        nodes: ClusterNodes | None,
        warn: Callable[[str], None],
    ) -> None:
        self._package = package
        self._settings = settings
        self._load = load
        self._nodes = nodes
        self._warn = warn
        self._networks: list[Network] = []
        self.starting: dict[Any, Network] = {}
        """Networks that are starting, by the Ray reference to wait for and then to pass to `continue_start`."""
        self._unreachable: list[tuple[Network, RayError, Callable[[Exception], None]]] = []
        """Networks that may be dead, with the error and the function to call with the cause once they are known to
        be."""
        self._failed_starts = Counter[Verdict]()
        """Failed starts since a network last loaded."""

    def __len__(self) -> int:
        return len(self._networks)

    @property
    def ready(self) -> list[Network]:
        """Networks that have loaded and can be given units."""
        return [network for network in self._networks if network.ready]

    @property
    def any_unreachable(self) -> bool:
        """Whether at least one network does not answer and may be dead."""
        return bool(self._unreachable)

    def least_loaded(self) -> Network | None:
        """Return the ready network with the fewest units in progress; None if no network is ready."""
        return min(self.ready, key=lambda network: network.units, default=None)

    def free_network(self, below_units: int, excluded: Network | None = None) -> Network | None:
        """Return the ready network with the fewest units in progress; None if none has fewer than `below_units`.

        Networks in which a unit must run alone are left out, and so is `excluded`.
        """
        free = [n for n in self.ready if not n.alone and n is not excluded and n.units < below_units]
        return min(free, key=lambda network: network.units, default=None)

    def start(self, plan: EnginePlan) -> None:
        """Start a network with the resources that `plan` reserves for it, and add it to `starting`.

        Return at once. Ray places the network on a node with enough free resources; if there is none, the network waits
        for one.
        """
        options = InferActor.options(  # type: ignore[attr-defined]  # what ray.remote makes of a class
            num_cpus=plan.network_cpus,
            num_gpus=plan.network_gpus,
            max_concurrency=plan.units_at_once,
            scheduling_strategy="SPREAD",
        )
        # Given to torch explicitly: an OMP_NUM_THREADS of the user's would override the reserved number.
        settings = replace(self._settings, threads=plan.threads)
        handle = options.remote(self._package, settings, self._load)
        network = Network(handle, self._nodes.nodes_lost if self._nodes else 0)
        self._networks.append(network)
        self.starting[handle.where.remote()] = network

    def continue_start(self, reference: Any) -> None:
        """Continue the start of a network: load it once its node is known, or mark it ready once it has loaded.

        The key `reference` is removed from `starting`; if the network is now loading, its new key is added. If the
        process of the network has died, `handle_failure` removes the network.

        `reference`: key of `starting` whose result is available.

        PackageError if the package cannot be loaded. HoverBatchError if loading raises another error, or too many
        starts failed in a row.
        """
        network = self.starting.pop(reference)
        try:
            node = ray.get(reference)
        except RayError as error:
            if not is_actor_failure(error):
                raise _load_error(error) from error
            self.handle_failure(network, error, self._start_failed)
            return
        if network.node:
            network.ready = True
            self._failed_starts.clear()
        else:
            network.node = node
            self.starting[network.handle.start.remote()] = network

    def _start_failed(self, cause: Exception) -> None:
        """Report a failed start. HoverBatchError if there were too many in a row."""
        verdict = verdict_on(cause)
        if verdict is Verdict.RETRY:
            return
        self._failed_starts[verdict] += 1
        failed, most = self._failed_starts[verdict], MAX_FAILED_STARTS
        if verdict is Verdict.NODE_LOST:
            most = MAX_LOST_STARTS
        if failed >= most:
            raise HoverBatchError(
                f"the process of the model died {failed} times in a row while it was loading: {cause}; memory may be "
                "too small: use fewer --cpus or --gpus"
            )
        self._warn(f"a network did not start: {cause}; starting another one (failed {failed} of at most {most} times)")

    def handle_failure(self, network: Network, error: RayError, on_dead: Callable[[Exception], None]) -> None:
        """Remove a network whose call failed with `error` (see `is_actor_failure`), and call `on_dead` with the cause.

        The cause is NetworkStopped, WorkerDied, or what the actor raised. The network's process is killed first, in
        case it is still alive. On a joined cluster, an actor that cannot be reached may be alive: then nothing is
        killed and `on_dead` is not called yet; `settle_unreachable` does both later.

        `on_dead`: decides what is retried; its errors propagate.
        """
        self._remove(network)
        if network.stopped:
            on_dead(NetworkStopped("its network was stopped"))
        elif isinstance(error, ActorUnavailableError) and self._nodes:
            if not network.presumed_dead_at:
                network.presumed_dead_at = time.monotonic() + NOTICED_S
            self._unreachable.append((network, error, on_dead))
        else:
            on_dead(self._cause(network, error))

    def settle_unreachable(self) -> bool:
        """Kill the unreachable networks that count as dead by now. Return whether there were any.

        A network counts as dead once its node is lost, or NOTICED_S seconds after its first failed call. The `on_dead`
        that was given to `handle_failure` is then called with the cause; its errors propagate.
        """
        unreachable, self._unreachable = self._unreachable, []
        for network, error, on_dead in unreachable:
            if time.monotonic() < network.presumed_dead_at and self._node_is_up(network):
                self._unreachable.append((network, error, on_dead))
            else:
                on_dead(self._cause(network, error))
        return len(self._unreachable) < len(unreachable)

    def _cause(self, network: Network, error: RayError) -> Exception:
        """Return why a network is dead: its node is lost, or else the cause of `error`."""
        ray.kill(network.handle)  # in case it lives after all
        if self._nodes:
            self._nodes.refresh()
        if not self._node_is_up(network):
            error = NodeDiedError("its node was lost")  # type: ignore[no-untyped-call]
        return cause_of(error)

    def _node_is_up(self, network: Network) -> bool:
        if self._nodes is None:
            return True
        if not network.node:  # not known yet: any node lost since it was started may have been its own
            return self._nodes.nodes_lost == network.nodes_lost_before
        return self._nodes.is_up(network.node)

    def stop(self, network: Network) -> None:
        """Kill the process of a network and remove it from the pool; do nothing if it is no longer there.

        Its units are retried in another network; the interruption is no strike on them.
        """
        if network in self._networks:
            network.stopped = True
            self._remove(network)
            ray.kill(network.handle)

    def adapt(self, max_networks: int) -> None:
        """Remove networks on lost nodes from the pool, then stop others until at most `max_networks` are left.

        A network whose node is not known yet is also removed if any node was lost since it was started. Networks that
        are still loading are stopped first, then those with the fewest units in progress. Units in progress are retried
        in other networks.
        """
        for network in [n for n in self._networks if not self._node_is_up(n)]:
            self._remove(network)  # Ray ends its calls with an error, after which its units are retried
        least_used_first = sorted(self._networks, key=lambda network: (network.ready, network.units))
        excess = max(0, len(self._networks) - max_networks)
        for network in least_used_first[:excess]:
            self.stop(network)

    def close(self) -> None:
        """Kill the processes of all networks, without waiting for their units in progress."""
        for network in self._networks:
            ray.kill(network.handle)

    def _remove(self, network: Network) -> None:
        if network in self._networks:
            self._networks.remove(network)


def is_actor_failure(error: RayError) -> bool:
    """Return whether a call failed because its actor died, was killed for lack of memory, or cannot be reached.

    An unreachable actor (ActorUnavailableError) may still be alive; `NetworkPool.handle_failure` finds out.
    """
    return isinstance(error, RayActorError | OutOfMemoryError)


def _load_error(error: RayError) -> HoverBatchError:
    """Return the error that stops the run when a network could not be loaded although its process is alive.

    It is the PackageError that the network raised, or else a HoverBatchError with the cause.
    """
    cause = cause_of(error)
    if isinstance(cause, PackageError):
        return cause
    if isinstance(cause, WorkerDied):
        return HoverBatchError(f"Ray cannot start a process for the model: {error}")
    return HoverBatchError(f"the model cannot be loaded: {cause}\n{error}")

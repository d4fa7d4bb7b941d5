"""Nodes of a joined Ray cluster, which may join and leave it during a run.

It imports Ray, so import it inside `cluster.started` or `cluster.joined`, which set Ray's environment.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hover_batch.errors import InputError
from hover_batch.executor.disk_space import is_disk_full
from hover_batch.executor.protocol import RunContext
from hover_batch.executor.resources import EnginePlan, Node, Resources, engine_plan

REFRESH_EVERY_S = 3.0
"""Seconds between queries of the cluster."""
NOTICED_S = 30.0
"""Seconds in which the cluster's head notices that a node is gone: five missed heartbeats, 3 s apart, and some more."""
VISIBLE_WITHIN_S = 10.0
"""Seconds in which a network file system shows a new file to other nodes."""


class ClusterNodes:
    """Nodes of the joined cluster that were live and had at least one CPU core at the last query.

    The first query is made at once. Use it from one thread.
    """

    def __init__(self) -> None:
        self._nodes = _live_nodes()
        self.nodes_lost = 0
        """Number of nodes that have left so far."""
        self._changed = False
        self._refresh_at = time.monotonic() + REFRESH_EVERY_S
        self._answers: dict[str, Any] = {}
        """By node id, whether it sees the output folder: a pending reference, or None once it has said yes."""
        self._refuse_at: dict[str, float] = {}
        """By id of a node whose test process died: when (monotonic) the node is refused unless it is gone by then."""
        self._probe = f".probe-{secrets.token_hex(8)}"

    @property
    def resources(self) -> Resources:
        """CPU cores, GPUs and memory in bytes of all live nodes, as of the last query, whether in use or not.

        A node that does not report its memory counts with 8 GiB.

        InputError if no node has a CPU core.
        """
        if not self._nodes:
            raise InputError("--address: the cluster has no node with a CPU core; add one, or use another cluster")
        offered = [node["Resources"] for _, node in sorted(self._nodes.items())]
        return Resources(
            tuple(Node(int(n["CPU"]), int(n.get("GPU", 0)), int(n.get("memory", 1 << 33))) for n in offered)
        )

    def replan(self, plan: EnginePlan, context: RunContext) -> EnginePlan | None:
        """Return a new plan if nodes joined or left the cluster since the last call; otherwise None.

        In the new plan, each network reserves the same as before. A change is logged and shown to the user. If no node
        is left, the user is warned and the result is None. The cluster is queried at most every REFRESH_EVERY_S
        seconds. New nodes are checked by `refuse_unshared`, without waiting. If the disk is too full for its test file,
        the run is paused.

        `plan`: plan until now. `context`: context of the run.

        InputError if a new node does not see the output folder, cannot run hover-batch, or its processes die at once.
        OSError if the test file cannot be written although the disk is not full.
        """
        if time.monotonic() >= self._refresh_at:
            self.refresh()
        recorder, settings, root = context.recorder, context.settings, context.recorder.layout.root
        try:
            self.refuse_unshared(root)
        except OSError as error:
            if not is_disk_full(error):
                raise
            context.disk.report_full(None)
        if not self._changed:
            return None
        self._changed = False
        try:
            available = self.resources.at_most(settings)
        except InputError:
            recorder.progress.warn("The cluster has no node left to work on: waiting for one")
            return None
        new_plan = engine_plan(available, settings, context.package.card, predicts=plan.networks > 0, previous=plan)
        recorder.log_event("nodes_changed", nodes=len(available.nodes), networks=new_plan.networks)
        for line in ("the nodes of the cluster changed:", *new_plan.lines()):
            recorder.progress.say(line)
        return new_plan

    def refresh(self) -> None:
        """Query the cluster for its live nodes now, and add those that left since the last query to `nodes_lost`."""
        self._refresh_at = time.monotonic() + REFRESH_EVERY_S
        nodes = _live_nodes()
        self.nodes_lost += len(self._nodes.keys() - nodes.keys())
        self._changed |= nodes.keys() != self._nodes.keys()
        self._nodes = nodes

    def is_up(self, node: str) -> bool:
        """Return whether the node was live at the last query of the cluster. `node`: Ray's id of the node."""
        return node in self._nodes

    def on_each(self, function: Callable[[], object], wait_s: float = 0.0) -> None:
        """Call `function` once on every live node, in a process there. Results and errors are ignored.

        `function`: must be picklable. `wait_s`: maximum time in seconds to wait for all calls to end; with 0, return at
        once.
        """
        calls = [
            _call.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(function)
            for node in self._nodes
        ]
        if calls and wait_s:
            ray.wait(calls, num_returns=len(calls), timeout=wait_s)

    def refuse_unshared(self, folder: Path, wait: bool = False) -> None:
        """Check that every node sees the files that this process writes into `folder`, the output folder.

        A hidden test file is created there, and removed once all nodes have answered. Nodes that have answered are not
        asked again. A node has VISIBLE_WITHIN_S seconds to see the file.

        `wait`: if True, wait for all answers; if False, a later call reads those that are pending.

        InputError if a node does not see the test file, cannot run hover-batch, or its processes die for NOTICED_S
        seconds while the node is live. OSError if the test file cannot be written.
        """
        all_answered = self._ask(folder, wait)
        while wait and not all_answered:
            all_answered = self._ask(folder, wait)

    def _ask(self, folder: Path, wait: bool) -> bool:
        """Ask the nodes that have not answered yet, as `refuse_unshared`. Return whether all have answered."""
        here = ray.get_runtime_context().get_node_id()
        probe = folder / self._probe
        for node in self._nodes:
            if node != here and node not in self._answers:
                probe.touch()
                on_node = NodeAffinitySchedulingStrategy(node, soft=False)
                self._answers[node] = _sees.options(scheduling_strategy=on_node).remote(probe)
        asked = {answer: node for node, answer in self._answers.items() if answer is not None}
        if not asked:
            return True
        answers, pending = ray.wait(list(asked), num_returns=len(asked), timeout=None if wait else 0)
        blind = []
        for answer in answers:
            node = asked[answer]
            self._answers[node] = None
            try:
                if not ray.get(answer):
                    blind.append(node)
            except RayTaskError as error:
                raise InputError(
                    f"--address: the node {self._address(node)} cannot run hover-batch ({error.cause}); install the "
                    "same version on all nodes of the cluster"
                ) from error
            except RayError as error:  # its process died, perhaps since the node is gone and writes nothing
                self.refresh()
                if not self.is_up(node):
                    continue
                if time.monotonic() > self._refuse_at.setdefault(node, time.monotonic() + NOTICED_S):
                    raise InputError(
                        f"--address: processes on the node {self._address(node)} die at once "
                        f"({type(error).__name__}); free memory there, or remove the node from the cluster"
                    ) from error
                del self._answers[node]
        done = not pending and all(node == here or self._answers.get(node, 0) is None for node in self._nodes)
        if blind or done:
            probe.unlink(missing_ok=True)
        if blind:
            addresses = [self._address(node) for node in blind]
            listed = ", ".join(addresses[:5]) + (" …" if len(addresses) > 5 else "")
            raise InputError(
                f"--output {folder}: {listed} cannot see what is written there; name a folder on a file system that "
                "all nodes of the cluster share"
            )
        return done

    def _address(self, node: str) -> str:
        return str(self._nodes[node]["NodeManagerAddress"]) if node in self._nodes else node


@ray.remote(num_cpus=0, max_retries=0)
def _call(function: Callable[[], object]) -> None:
    function()


@ray.remote(num_cpus=0, max_retries=0)
def _sees(probe: Path) -> bool:
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while not probe.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _live_nodes() -> dict[str, dict[str, Any]]:
    """Live nodes by id, without zero-CPU head nodes."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {n["NodeID"]: n for n in nodes if n["Alive"] and n["Resources"].get("CPU", 0) >= 1}

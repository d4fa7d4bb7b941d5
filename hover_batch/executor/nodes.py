"""The machines of the Ray cluster that was joined: they come and go while a run goes on.

Import this after `hover_batch.executor.cluster` has been entered.
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
from hover_batch.executor.resources import Node, Resources

LOOK_EVERY_S = 3.0
NOTICED_S = 30.0
"""Within which the cluster's head notices that a machine is gone: it misses five of its signs of life, 3 s apart."""
SHARED_S = 10.0
"""Within which a network file system shows a new file to other machines."""


class Machines:
    """Those that are up and have a core to work on, as they were when it was last asked."""

    def __init__(self) -> None:
        self._nodes = _alive()
        self.lost = 0
        """Machines that were seen to go, so far."""
        self._changed = False
        self._look_at = time.monotonic() + LOOK_EVERY_S
        self._asked: dict[str, Any] = {}
        """What each machine answers, by its id, when it was asked whether it sees the output; None: it does."""
        self._probe = f".probe-{secrets.token_hex(8)}"

    @property
    def resources(self) -> Resources:
        """InputError where there is none to work on."""
        return _resources(self._nodes)

    def changed(self) -> bool:
        """Whether some came or went since this was last called. The cluster is asked every few seconds."""
        if time.monotonic() >= self._look_at:
            self.look()
        changed, self._changed = self._changed, False
        return changed

    def look(self) -> None:
        """Ask the cluster now."""
        self._look_at = time.monotonic() + LOOK_EVERY_S
        nodes = _alive()
        self.lost += len(self._nodes.keys() - nodes.keys())
        self._changed |= nodes.keys() != self._nodes.keys()
        self._nodes = nodes

    def up(self, node: str) -> bool:
        """Whether the machine of this id was there at the last look."""
        return node in self._nodes

    def on_each(self, do: Callable[[], object], wait_s: float = 0.0) -> None:
        """Have something done on every machine that is up. What becomes of it is not asked."""
        asked = [
            _do.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote(do)
            for name in self._nodes
        ]
        if asked and wait_s:
            ray.wait(asked, num_returns=len(asked), timeout=wait_s)

    def refuse_unshared(self, folder: Path, wait: bool = False) -> None:
        """InputError where a machine does not see what this process writes into `folder`. Each is asked once, and its
        answer heeded by a later call, unless this one is to `wait`."""
        here = ray.get_runtime_context().get_node_id()
        probe = folder / self._probe
        for name in self._nodes:
            if name != here and name not in self._asked:
                probe.touch()
                there = NodeAffinitySchedulingStrategy(name, soft=False)
                self._asked[name] = _sees.options(scheduling_strategy=there).remote(probe)
        asked = {answer: name for name, answer in self._asked.items() if answer is not None}
        if not asked:
            return
        answers, pending = ray.wait(list(asked), num_returns=len(asked), timeout=None if wait else 0)
        blind = []
        for answer in answers:
            self._asked[asked[answer]] = None
            try:
                if not ray.get(answer):
                    blind.append(asked[answer])
            except RayTaskError as error:
                address = self._nodes[asked[answer]]["NodeManagerAddress"]
                raise InputError(f"--address: {address} cannot work for this run ({error.cause})") from error
            except RayError:  # gone meanwhile: it will write nothing
                continue
        if blind or not pending:
            probe.unlink(missing_ok=True)
        if blind:
            addresses = [self._nodes[name]["NodeManagerAddress"] for name in blind if name in self._nodes]
            listed = ", ".join(addresses[:5]) + (" …" if len(addresses) > 5 else "")
            raise InputError(
                f"--output {folder}: {listed} cannot see what is written there; name a folder on a file system that "
                "all machines of the cluster share"
            )


@ray.remote(num_cpus=0, max_retries=0)
def _do(do: Callable[[], object]) -> None:
    do()


@ray.remote(num_cpus=0, max_retries=0)
def _sees(probe: Path) -> bool:
    deadline = time.monotonic() + SHARED_S
    while not probe.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _alive() -> dict[str, dict[str, Any]]:
    """By id. A head that is told to do no work has no cores, and is none of them."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {n["NodeID"]: n for n in nodes if n["Alive"] and n["Resources"].get("CPU", 0) >= 1}


def _resources(nodes: dict[str, dict[str, Any]]) -> Resources:
    if not nodes:
        raise InputError("--address: the cluster has no machine with a core to work on")
    there = [node["Resources"] for _, node in sorted(nodes.items())]
    return Resources(tuple(Node(int(n["CPU"]), int(n.get("GPU", 0)), int(n.get("memory", 1 << 33))) for n in there))

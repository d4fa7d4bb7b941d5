"""The test file that each node of a joined cluster must see, without Ray: its answers are planned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hover_batch.errors import InputError
from hover_batch.executor.cluster import prepare_own_cluster

prepare_own_cluster()  # before Ray is imported, for the tests after this one

from ray.exceptions import NodeDiedError, WorkerCrashedError  # noqa: E402

from hover_batch.executor import cluster, nodes  # noqa: E402

DIED = WorkerCrashedError()
GONE = NodeDiedError("its node was lost")  # type: ignore[no-untyped-call]
HERE, THERE = "0" * 56, "1" * 56
Probe = Callable[[list[bool | Exception]], nodes.ClusterNodes]


@pytest.fixture
def node_that_answers(monkeypatch: pytest.MonkeyPatch) -> Probe:
    """Make the nodes of a cluster of this one and another, which gives these answers, one after the other."""
    alive = {name: {"NodeManagerAddress": f"address of {name}"} for name in (HERE, THERE)}

    def make(answers: list[bool | Exception]) -> nodes.ClusterNodes:
        def get(reference: object) -> bool:
            answer = answers.pop(0)
            if isinstance(answer, NodeDiedError):
                del alive[THERE]
            if isinstance(answer, Exception):
                raise answer
            return answer

        sees = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda probe: object()))
        fake: Any = SimpleNamespace(
            get=get,
            wait=lambda references, **_: (references, []),
            get_runtime_context=lambda: SimpleNamespace(get_node_id=lambda: HERE),
        )
        monkeypatch.setattr(nodes, "ray", fake)
        monkeypatch.setattr(nodes, "_sees", sees)
        monkeypatch.setattr(nodes, "_live_nodes", lambda: dict(alive))
        return nodes.ClusterNodes()

    return make


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("died", [[], [DIED], [DIED, DIED]])
def test_a_node_whose_test_process_died_is_asked_again(
    node_that_answers: Probe, tmp_path: Path, died: list[bool | Exception], wait: bool
) -> None:
    cluster = node_that_answers([*died, False])
    with pytest.raises(InputError, match="address of 1+ cannot see what is written there"):
        for _ in range(1 if wait else 1 + len(died)):
            cluster.refuse_unshared(tmp_path, wait=wait)
    assert not list(tmp_path.iterdir())


def test_a_node_that_answers_after_all_or_is_gone_is_not_refused(node_that_answers: Probe, tmp_path: Path) -> None:
    for answers in ([DIED, True], [DIED, GONE]):
        left: list[bool | Exception] = list(answers)
        node_that_answers(left).refuse_unshared(tmp_path, wait=True)
        assert not left and not list(tmp_path.iterdir())


def test_a_live_node_whose_processes_always_die_is_refused(
    node_that_answers: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "NOTICED_S", 0.0)
    with pytest.raises(InputError, match="processes on the node address of 1+ die at once.*free memory there"):
        node_that_answers([DIED] * 9).refuse_unshared(tmp_path, wait=True)


def test_a_log_that_cannot_be_written_is_not_a_missing_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").write_text("a file")
    monkeypatch.setattr(cluster, "_require_listener", lambda *_: None)
    monkeypatch.setattr(cluster, "_prepare", lambda: None)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(shutdown=lambda: None))
    monkeypatch.setattr(os, "isatty", lambda _: False)
    with pytest.raises(FileExistsError, match="logs"), cluster.joined("host:6379", tmp_path / "logs" / "ray.log"):
        pass

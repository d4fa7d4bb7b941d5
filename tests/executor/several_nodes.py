"""Run a cohort on a cluster of several nodes on this machine: `several_nodes.py PLAN.json`.

It is a program, since a process can have only one cluster. The plan has `cohort`, `out`, `gpus` (logical GPUs of each
node; 0: networks on the CPU), `cpus`, `nodes` (initial number, besides a head without cores), `seconds` (of a batch),
`unit`, and `events`: a list of [event of the run, count, "remove" or "add"], the change of a node once the event was
logged that often. The last line of output is JSON: the exit code, the seconds from the first unit to the last, the
share of the time in which networks were busy, and samples of the driver's memory and CPU time.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from hover_batch.cohort.events import stream_events
from hover_batch.config import EngineSettings, InferSettings, Settings, TissueSettings
from hover_batch.executor.cluster import START_ATTEMPTS, prepare_own_cluster

prepare_own_cluster()

import ray  # noqa: E402  (its environment had to be set)
from accelerators import LoadQuick  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

import hover_batch.executor.cluster  # noqa: E402
import hover_batch.executor.ray  # noqa: E402
from hover_batch.segment import run_segment  # noqa: E402

STORE = 160 << 20


def settings_of(plan: dict[str, Any], address: str) -> Settings:
    return Settings(
        tissue=TissueSettings(tissue="all"),
        infer=InferSettings(
            unit=plan["unit"], batch=2, precision="fp32", threads=1, device="cuda" if plan["gpus"] else "cpu"
        ),
        engine=EngineSettings(address=address, gpus=plan["gpus"] * plan["nodes"] or -1),
    )


def follow(plan: dict[str, Any], cluster: Any, nodes: list[Any], node: dict[str, Any], over: threading.Event) -> None:
    """Remove and add nodes by the plan's `events`."""
    log = Path(plan["out"]) / "logs" / "events.jsonl"
    for name, times, what in plan["events"]:
        while sum(event["event"] == name for event in stream_events(log)) < times:
            if over.wait(0.05):
                return
        print(time.time(), what, flush=True)
        if what == "remove":
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        else:
            nodes.append(cluster.add_node(**node))
    over.wait()  # a node ends with the thread that started it


def watch(samples: list[dict[str, float]], over: threading.Event) -> None:
    """Sample each second: the driver's memory in bytes, its CPU seconds, and the bytes in the object store."""
    driver, store = psutil.Process(), "object_store_memory"
    while not over.wait(1.0):
        with contextlib.suppress(Exception):  # not joined yet, or no longer
            used = ray.cluster_resources()[store] - ray.available_resources().get(store, 0.0)
            rss, cpu = driver.memory_info().rss, driver.cpu_times()
            samples.append({"time": time.time(), "rss": rss, "cpu": cpu.user + cpu.system, "store": used})


def cluster_of(nodes: int, node: dict[str, Any]) -> tuple[Any, list[Any]]:
    """A head without cores, and so many nodes. Retried, since Ray's 30 s to start are too little on a busy machine."""
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE, "node_ip_address": "127.0.0.1"}
    for attempts_left in reversed(range(START_ATTEMPTS)):
        try:
            cluster = Cluster(initialize_head=True, head_node_args=head)
            return cluster, [cluster.add_node(**node) for _ in range(nodes)]
        except Exception:  # Ray raises plain Exception here
            if not attempts_left:
                raise
            time.sleep(5)
    raise AssertionError


def main(plan: dict[str, Any]) -> dict[str, Any]:
    node = {"num_cpus": plan["cpus"], "num_gpus": plan["gpus"], "object_store_memory": STORE}
    cluster, nodes = cluster_of(plan["nodes"], node)
    hover_batch.executor.ray.RayExecutor = functools.partial(  # type: ignore[assignment,misc]
        hover_batch.executor.ray.RayExecutor, load=LoadQuick(plan["seconds"])
    )
    # The GPUs are simulated, so torch would find none.
    hover_batch.executor.cluster.resolve_on_cluster = lambda settings, on_gpu: replace(  # type: ignore[assignment]
        settings, device="cuda" if on_gpu else "cpu"
    )
    # Ray can set it in the main thread only, and here nodes are added by another one.
    ray._private.utils.set_sigterm_handler = lambda handler: None  # type: ignore[attr-defined]
    over = threading.Event()
    follower = threading.Thread(target=follow, args=(plan, cluster, nodes, node, over))
    follower.start()
    samples: list[dict[str, float]] = []
    watcher = threading.Thread(target=watch, args=(samples, over))
    watcher.start()
    try:
        settings = settings_of(plan, cluster.address)
        outcome = run_segment(
            plan["cohort"], Path(plan["out"]), settings, skip_invalid=False, force=False, command=["test"]
        )
    finally:
        over.set()
        follower.join()
        watcher.join()
        ray.shutdown()
        with contextlib.suppress(Exception):
            cluster.shutdown()
    done = [e["spans"] for e in stream_events(Path(plan["out"]) / "logs" / "events.jsonl") if e["event"] == "unit_done"]
    spans = [span["infer"] for span in done]
    return {
        "exit_code": outcome.exit_code,
        "seconds": max(end for _, end in spans) - min(start for start, _ in spans),
        "busy": outcome.model_busy,
        "samples": samples,
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))

"""The Ray cluster of a run: started on this machine for the time of the run, or joined where one is named.

Ray's servers listen on more than loopback whatever they are told, so a cluster of ours asks everyone for a token that
is made anew for each run.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hover_batch.config import InferSettings
from hover_batch.errors import HoverBatchError, InputError
from hover_batch.executor.resources import Node, Resources

_ENVIRONMENT = {
    # `uv run` would have each worker make an environment of its own.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "error",
    # A call that fails has two results, and the driver looks at one of them.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
"""Ray reads its environment when it is imported: hence every `import ray` here stands below `_prepare`."""
_TOKEN = secrets.token_hex(32)
"""Of this process's own clusters; Ray keeps the first that it sees."""
CONNECT_S = 5.0
SHARED_S = 10.0
"""Within which a network file system shows a new file to other machines."""
START_ATTEMPTS = 3
"""Ray gives its own processes 30 s to come up, which a busy machine may overrun."""
OBJECT_STORE_BYTES = 512 << 20
"""Where the work says nothing else: room for small messages."""
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}


@contextlib.contextmanager
def started(resources: Resources, log: Path, object_store_bytes: int = OBJECT_STORE_BYTES) -> Iterator[None]:
    """A cluster on this machine of these cores and GPUs, gone with all its processes when the block ends.

    `log`: the file for what Ray has to say meanwhile; stdout is for results. Raises HoverBatchError where Ray does not
    come up.
    """
    ask_for_token()
    import ray

    # Short: sockets lie in it, and their paths have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="hb-", dir="/tmp" if os.access("/tmp", os.W_OK) else None))
    try:
        with _talking_to(log):
            _start(resources, object_store_bytes, folder)
            yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def ask_for_token() -> None:
    """Set the environment for clusters of this process, which must be done before anything imports Ray."""
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN})
    _prepare()


def _prepare() -> None:
    """Set what Ray is to find in the environment, where the user has not."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _start(resources: Resources, object_store_bytes: int, folder: Path) -> None:
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",  # else it joins whatever cluster it finds
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                **_QUIET,
            )
            return
        except Exception as error:  # Ray raises plain Exception here
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                reason = str(error).strip().splitlines()[0]
                raise HoverBatchError(
                    f"Ray did not start on this machine in {START_ATTEMPTS} attempts ({reason}); try again when it is "
                    "less busy, or --backend local, which does without"
                ) from error
            time.sleep(2)


@contextlib.contextmanager
def joined(address: str, log: Path) -> Iterator[Resources]:
    """Join the cluster at `address`; yields what it has. InputError where none answers."""
    _answers(address)
    _prepare()
    import ray

    try:
        with _talking_to(log):
            try:
                ray.init(address=address, **_QUIET)
            except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and more
                raise InputError(
                    f"--address {address}: no Ray cluster answers there ({error}); start one by `ray start --head`, "
                    "and give its token as RAY_AUTH_TOKEN where it asks for one"
                ) from error
            yield _cluster_resources()
    finally:
        ray.shutdown()


def _answers(address: str) -> None:
    """InputError where nobody listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdigit():  # auto, local, ray://…: Ray's to understand
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address}: nobody answers there ({error}); is the cluster up?") from error


def settled(settings: InferSettings, resources: Resources) -> InferSettings:
    """The settings with `auto` settled where the networks will run: on a machine of the joined cluster, not here.

    Raises what `hover_batch.model.predict.resolve` raises there.
    """
    import ray
    from ray.exceptions import RayTaskError

    @ray.remote(num_cpus=1, num_gpus=min(1, resources.gpus), max_retries=0)
    def resolve_there() -> InferSettings:
        from hover_batch.model.predict import resolve

        return resolve(settings)

    try:
        found: InferSettings = ray.get(resolve_there.remote())
    except RayTaskError as error:
        raise error.cause from None
    return found


def refuse_unshared(folder: Path) -> None:
    """InputError where a machine of the joined cluster does not see what this process writes into `folder`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    alive = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]  # type: ignore[no-untyped-call]
    others = [n for n in alive if n["NodeID"] != here]
    probe = folder / f".probe-{secrets.token_hex(8)}"

    @ray.remote(num_cpus=0, max_retries=0)
    def sees() -> bool:
        deadline = time.monotonic() + SHARED_S
        while not probe.is_file():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        return True

    probe.touch()
    try:
        tasks = [
            sees.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n["NodeID"], soft=False)).remote()
            for n in others
        ]
        blind = [n["NodeManagerAddress"] for n, seen in zip(others, ray.get(tasks), strict=True) if not seen]
    finally:
        probe.unlink()
    if blind:
        listed = ", ".join(blind[:5]) + (" …" if len(blind) > 5 else "")
        raise InputError(
            f"--output {folder}: {listed} cannot see what is written there; name a folder on a file system that "
            "all machines of the cluster share"
        )


def _cluster_resources() -> Resources:
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    # A head that is told to do no work has no cores.
    nodes = [Node(int(n.get("CPU", 0)), int(n.get("GPU", 0)), int(n.get("memory", 1 << 33))) for n in alive]
    if not (useful := [node for node in nodes if node.cpus]):
        raise InputError("--address: the cluster has no machine with a core to work on")
    return Resources(tuple(useful))


class _LateFile(io.TextIOBase):
    """A file to append to that is made when there is something to write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            return file.write(text)


def _talking_to(log: Path) -> contextlib.redirect_stdout[_LateFile]:
    """Ray's background thread prints what befalls its workers on stdout."""
    return contextlib.redirect_stdout(_LateFile(log))

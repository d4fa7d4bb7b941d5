"""The Ray cluster of a run: started on this machine for the run, or joined by its address.

Ray's servers cannot be confined to loopback, so a cluster of our own demands a token, made anew for each run.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hover_batch.config import InferSettings
from hover_batch.errors import HoverBatchError, InputError
from hover_batch.executor.resources import Resources

_ENVIRONMENT = {
    # Else, under `uv run`, each worker would make an environment of its own.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "error",
    # A failed call has two results, of which the driver reads one.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
"""Ray reads its environment when it is imported, so every `import ray` here comes after `_prepare`."""
_TOKEN = secrets.token_hex(32)
"""Token of this process's own clusters. Ray keeps the first one that it sees, so there is one for all of them."""
CONNECT_S = 5.0
START_ATTEMPTS = 3
"""Ray gives its own processes 30 s to start, which is too little on a busy machine."""
OBJECT_STORE_BYTES = 512 << 20
"""Default size of the object store: enough for small messages."""
_PREFIX, _OWNER = "hb-", "owner"
"""Prefix of the folders for Ray's files, and the file in them that stays locked while their owner lives."""
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}


@contextlib.contextmanager
def started(resources: Resources, log: Path, object_store_bytes: int = OBJECT_STORE_BYTES) -> Iterator[None]:
    """Run a cluster of these cores and GPUs on this machine while the block runs.

    `log`: file for Ray's output, since stdout is for results. HoverBatchError if Ray does not start.
    """
    ask_for_token()
    import ray

    with own_folder(Path("/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir())) as folder:
        try:
            with _stdout_to(log):
                with _stderr_to(log):
                    _start(resources, object_store_bytes, folder)
                yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A new folder for Ray in `parent`, removed when the block ends; folders of killed processes too.

    The owner holds a lock on a file in it, which the system drops when the process ends, however it ends.
    """
    for left in parent.glob(f"{_PREFIX}*"):
        if _owner_is_dead(left):
            shutil.rmtree(left, ignore_errors=True)
    # A short name: the paths of sockets in it may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        with open(folder / "new", "xb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            os.rename(folder / "new", folder / _OWNER)  # so that it is locked before another process can see it
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _owner_is_dead(folder: Path) -> bool:
    """Whether the folder can be removed; False in doubt, as for another user's folder or one without an owner file."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return False
        with open(folder / _OWNER, "rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def ask_for_token() -> None:
    """Set the environment for clusters of this process. Call it before anything imports Ray."""
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN})
    _prepare()


def _prepare() -> None:
    """Set the variables that Ray reads, except those that the user has set."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def ray_version() -> str:
    """Installed Ray version; import errors propagate."""
    _prepare()
    import ray

    return str(ray.__version__)


def _init(**settings: Any) -> None:
    """Call ray.init, which sets a handler of its own for SIGTERM, and set the previous one again."""
    import ray

    before = signal.getsignal(signal.SIGTERM)
    ray.init(**settings, **_QUIET)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _start(resources: Resources, object_store_bytes: int, folder: Path) -> None:
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            _init(
                address="local",  # or it would join any cluster that it finds
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
                object_store_memory=object_store_bytes,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
            )
            return
        except Exception as error:  # Ray raises plain Exception here
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                reason = str(error).strip().splitlines()[0]
                raise HoverBatchError(
                    f"Ray did not start on this machine in {START_ATTEMPTS} attempts ({reason}); try again when the "
                    "machine is less busy, or use --backend local, which does not need Ray"
                ) from error
            time.sleep(2)


@contextlib.contextmanager
def joined(address: str, log: Path) -> Iterator[None]:
    """Join the cluster at `address` while the block runs. InputError if none answers."""
    _require_listener(address)
    _prepare()
    import ray

    try:
        with _stdout_to(log):
            try:
                with _stderr_to(log):
                    _init(address=address)
            except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and more
                raise InputError(
                    f"--address {address}: no Ray cluster answers there ({error}); start one by `ray start --head`, "
                    "and set RAY_AUTH_TOKEN to its token if it demands one"
                ) from error
            yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """InputError if nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdigit():  # auto, local, ray://…: for Ray to resolve
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--address {address}: nobody answers there ({error}); check the address and start the cluster"
        ) from error


def settled(settings: InferSettings, on_gpu: bool) -> InferSettings:
    """The settings with `auto` settled on a machine of the joined cluster, where the networks will run.

    Wait for such a machine if none is up yet. Raise what `hover_batch.model.predict.resolve` raises there.
    """
    import ray
    from ray.exceptions import RayTaskError

    @ray.remote(num_cpus=1, num_gpus=int(on_gpu), max_retries=0)
    def resolve_there() -> InferSettings:
        from hover_batch.model.predict import resolve

        return resolve(settings)

    try:
        found: InferSettings = ray.get(resolve_there.remote())
    except RayTaskError as error:
        raise error.cause from None
    return found


class _LazyFile(io.TextIOBase):
    """A file to append to, created by the first write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            return file.write(text)


def _stdout_to(log: Path) -> contextlib.redirect_stdout[_LazyFile]:
    """Redirect stdout to `log`: a background thread of Ray prints there about its workers."""
    return contextlib.redirect_stdout(_LazyFile(log))


@contextlib.contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """Redirect descriptor 2 to `log`, except from a terminal, where progress bars are drawn.

    While Ray starts, its core writes there directly, not through Python; stderr may be asked for lines of JSON.
    """
    if sys.stderr is None or os.isatty(2):
        yield
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    stderr = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)

"""Start a Ray cluster on this machine for a run, or join one by its address.

Ray's servers cannot be confined to loopback, so a cluster that we start requires a token, which is new for each
process.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hover_batch.config import InferSettings
from hover_batch.errors import InputError
from hover_batch.executor.raylet_watch import exit_if_raylet_dies
from hover_batch.executor.resources import Resources
from hover_batch.model.package import Package

_ENVIRONMENT = {
    # Without this, each worker under `uv run` would create its own environment.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "error",
    # A failed call has two results, of which the driver reads one.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
"""Ray reads its environment when it is imported, so every `import ray` here comes after `_prepare`."""
_TOKEN = secrets.token_hex(32)
"""Token of the clusters that this process starts. Ray keeps the first token that it reads, so they share one."""
CONNECT_S = 5.0
"""Timeout in seconds of the first connection to a cluster."""
START_ATTEMPTS = 3
"""Attempts to start Ray. It gives its own processes 30 s, which is too little on a busy machine."""
OBJECT_STORE_BYTES = 512 << 20
"""Default size of the object store in bytes: enough for small messages."""
_PREFIX, _OWNER = "hb-", "owner"
"""Prefix of the folders for Ray's files, and the file in them that their owner keeps locked while it runs."""
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}


@contextlib.contextmanager
def started(
    resources: Resources,
    log: Path,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    warn: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Iterator[None]:
    """Run a Ray cluster with the cores and GPUs of `resources` on this machine while the block runs.

    Ray's environment variables are set, and stay set. While the block runs, stdout is redirected to `log`, since Ray
    prints messages there. During the start, stderr is redirected, too, unless it is a terminal.

    If the cluster's raylet dies meanwhile, the process ends with exit code 1 (see `exit_if_raylet_dies`).

    `log`: file to which output is appended; it is created with its folder when needed. `object_store_bytes`: size of
    Ray's object store. `warn`: function that shows a line about each failed attempt that is followed by another, and
    about the death of the raylet.

    InputError if Ray does not start in START_ATTEMPTS attempts, OSError if its temporary folder cannot be created.
    """
    prepare_own_cluster()
    import ray

    with own_folder(Path("/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir())) as folder:
        try:
            with _stdout_to(log):
                _start(resources, object_store_bytes, folder, log, warn)

                def raylet_died() -> None:
                    warn(
                        f"Ray's raylet has died, perhaps because memory ran out (see {log}), so the run stops; "
                        "finished work is kept: run the same command again to resume"
                    )
                    _kill_processes_of(folder)

                with exit_if_raylet_dies(folder, raylet_died):
                    yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder for Ray's files in `parent`, and remove it when the block ends.

    Folders in `parent` that killed processes of this user have left are removed, too. They are recognised by a file in
    them that their owner keeps locked, since the system releases the lock when the process ends, even if it is killed.

    OSError if the folder cannot be created.
    """
    for leftover in parent.glob(f"{_PREFIX}*"):
        if _owner_is_dead(leftover):
            shutil.rmtree(leftover, ignore_errors=True)
    # A short name, since paths of the sockets in it are limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        with open(folder / "new", "xb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            os.rename(folder / "new", folder / _OWNER)  # so that it is locked before another process can see it
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _owner_is_dead(folder: Path) -> bool:
    """Return whether the folder's owner has ended, so that the folder can be removed.

    False if in doubt, as for another user's folder, or one without an owner file.
    """
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return False
        with open(folder / _OWNER, "rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def prepare_own_cluster() -> None:
    """Set Ray's environment variables, with a token, for a cluster that this process starts.

    RAY_AUTH_MODE and RAY_AUTH_TOKEN are replaced; other variables that the user has set stay. Call it before anything
    imports Ray, which reads them at that time.
    """
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN})
    _prepare()


def _prepare() -> None:
    """Set the environment variables that Ray reads on import, except those that the user has set."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def ray_version() -> str:
    """Return the version of the installed Ray, such as 2.40.0.

    Ray's environment variables are set first, unless the user has set them, since Ray reads them when it is imported.
    ImportError if it cannot be imported.
    """
    _prepare()
    import ray

    return str(ray.__version__)


def _init(**settings: Any) -> None:
    """Call ray.init, which sets a handler of its own for SIGTERM, and set the previous one again."""
    import ray

    previous_handler = signal.getsignal(signal.SIGTERM)
    ray.init(**settings, **_QUIET)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, previous_handler)


def _start(resources: Resources, object_store_bytes: int, folder: Path, log: Path, warn: Callable[[str], None]) -> None:
    """Start Ray with its files in `folder`. InputError if it fails START_ATTEMPTS times."""
    import ray

    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            with _stderr_to(log):
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
            _kill_processes_of(folder)
            if isinstance(error, OSError) and error.filename == str(log):
                raise
            reason = str(error).strip().splitlines()[0]
            if attempt == START_ATTEMPTS:
                raise InputError(
                    f"Ray did not start on this machine in {START_ATTEMPTS} attempts ({reason}); try again when the "
                    "machine is less busy, or use --backend local, which does not need Ray"
                ) from error
            warn(f"Ray did not start ({reason}): trying again (attempt {attempt} of {START_ATTEMPTS} failed)")
            time.sleep(2)


def _kill_processes_of(folder: Path) -> None:
    """Kill the processes that a failed start or a dead raylet left behind, since Ray does not end them.

    The name of the folder, which is random, is in their command lines.
    """
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in command_line.read_bytes():
                os.kill(int(command_line.parent.name), signal.SIGKILL)


@contextlib.contextmanager
def joined(address: str, log: Path) -> Iterator[None]:
    """Join the Ray cluster at `address` while the block runs, and leave it afterwards.

    Ray's environment variables are set, and stay set. While the block runs, stdout is redirected to `log`, since Ray
    prints messages there. While joining, stderr is redirected, too, unless it is a terminal.

    `address`: HOST:PORT, or another form that `ray.init` accepts. `log`: file to which output is appended; it is
    created with its folder when needed.

    InputError if no cluster answers, or if it refuses the token; OSError if `log` cannot be written.
    """
    host_port = _host_port(address)
    if host_port:
        _require_listener(address, *host_port)
    _prepare()
    import ray

    try:
        with _stdout_to(log):
            try:
                with _stderr_to(log):
                    if host_port:
                        _require_token(address)
                    _init(address=address)
            except InputError:  # from _require_token, which has already said what is wrong
                raise
            except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and more
                if isinstance(error, OSError) and error.filename is not None:  # the log cannot be written
                    raise
                raise InputError(
                    f"--address {address}: no Ray cluster answers there ({error}); start one with `ray start --head`, "
                    "and set RAY_AUTH_TOKEN to its token if it requires one"
                ) from error
            yield
    finally:
        ray.shutdown()


def _host_port(address: str) -> tuple[str, int] | None:
    """Return host and port of an address HOST:PORT; None for other forms (auto, local, ray://…), which Ray resolves.

    InputError if the port is not a number from 1 to 65535.
    """
    host, colon, port = address.rpartition(":")
    if not colon or "/" in address:
        return None
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise InputError(f"--address {address}: its port is not a number from 1 to 65535; give HOST:PORT")
    return host.strip("[]"), int(port)


def _require_listener(address: str, host: str, port: int) -> None:
    """Raise InputError if nothing listens at `host` and `port`; Ray itself would try for minutes."""
    try:
        socket.create_connection((host, port), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--address {address}: nothing answers there ({error}); check the address, or start the cluster"
        ) from error


def _require_token(address: str) -> None:
    """Raise InputError if the cluster refuses the token; Ray itself would try for 20 s, and not give the reason."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # in compiled code
    from ray.exceptions import AuthenticationError, RpcError

    try:
        GcsClient(address=address).internal_kv_keys(b"", None, timeout=CONNECT_S)
    except AuthenticationError as error:
        raise InputError(
            f"--address {address}: the cluster refuses the token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the "
            "token of the cluster"
        ) from error
    except RpcError:  # busy, or not a cluster: ray.init finds out
        return


def resolve_on_cluster(settings: InferSettings, on_gpu: bool) -> InferSettings:
    """Return the settings with `auto` resolved on a node of the joined cluster on which networks can run.

    If no such node is up yet, wait for one. On a GPU, AUTO_BATCH remains, since the batch size depends on the network
    (see `auto_batch_there`).

    `settings`: settings of inference. `on_gpu`: whether the node must have a GPU.

    InputError if the device cannot be used there, or cannot be combined with the runtime or the precision. RayError if
    the process on the node dies.
    """
    import ray
    from ray.exceptions import RayTaskError

    @ray.remote(num_cpus=1, num_gpus=int(on_gpu), max_retries=0)
    def resolve_there() -> InferSettings:
        from hover_batch.model.predict import resolve

        return resolve(settings)

    try:
        resolved: InferSettings = ray.get(resolve_there.remote())
    except RayTaskError as error:
        raise error.cause from None
    return resolved


def auto_batch_there(package: Package, settings: InferSettings) -> int:
    """Return the batch size of `--batch auto`, found in a trial on a GPU of the joined cluster.

    If no node has a free GPU, wait for one.

    `package`: package of the model. `settings`: settings of inference, with AUTO_BATCH.

    InputError if the device cannot be used there, PackageError if the network cannot be loaded or compiled, RayError if
    the process on the node dies.
    """
    import ray
    from ray.exceptions import RayTaskError

    @ray.remote(num_cpus=1, num_gpus=1, max_retries=0)
    def auto_batch_on_gpu() -> int:
        from hover_batch.model.predict import auto_batch

        return auto_batch(package, settings)

    try:
        batch: int = ray.get(auto_batch_on_gpu.remote())
    except RayTaskError as error:
        raise error.cause from None
    return batch


class _LazyFile(io.TextIOBase):
    """Text stream that appends to a file, which is created by the first write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> int:
        """Append `text` and return its length."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            return file.write(text)


def _stdout_to(log: Path) -> contextlib.redirect_stdout[_LazyFile]:
    """Redirect stdout to `log`, since a background thread of Ray prints messages about its workers."""
    return contextlib.redirect_stdout(_LazyFile(log))


@contextlib.contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """Redirect file descriptor 2 (stderr) to `log`, unless it is a terminal, where progress bars are drawn.

    While Ray starts, its core writes to it directly, not through Python, but stderr may have to be lines of JSON.
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

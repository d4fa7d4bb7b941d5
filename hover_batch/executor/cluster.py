"""The Ray cluster of a run: started on this machine for the time of the run, or joined where one is named.

Ray's servers listen on more than loopback whatever they are told, so a cluster of ours asks everyone for a token that
is made anew for each run.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hover_batch.config import InferSettings
from hover_batch.errors import HoverBatchError, InputError
from hover_batch.executor.resources import Resources

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
START_ATTEMPTS = 3
"""Ray gives its own processes 30 s to come up, which a busy machine may overrun."""
OBJECT_STORE_BYTES = 512 << 20
"""Where the work says nothing else: room for small messages."""
_PREFIX, _OWNER = "hb-", "owner"
"""Of the folders for Ray's files, and the file in them that is locked while their owner lives."""
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}


@contextlib.contextmanager
def started(resources: Resources, log: Path, object_store_bytes: int = OBJECT_STORE_BYTES) -> Iterator[None]:
    """A cluster on this machine of these cores and GPUs, gone with all its processes when the block ends.

    `log`: the file for what Ray has to say meanwhile; stdout is for results. Raises HoverBatchError where Ray does not
    come up.
    """
    ask_for_token()
    import ray

    with own_folder(Path("/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir())) as folder:
        try:
            with _talking_to(log):
                with _coming_up(log):
                    _start(resources, object_store_bytes, folder)
                yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """A new folder for Ray, removed when the block ends; those that killed processes left in `parent` are removed, too.

    Who lives holds a lock on a file in it, which the system lets go of at his death, however that comes.
    """
    for left in parent.glob(f"{_PREFIX}*"):
        if _owner_is_dead(left):
            shutil.rmtree(left, ignore_errors=True)
    # Short: sockets lie in it, and their paths have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        with open(folder / "new", "xb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX)
            os.rename(folder / "new", folder / _OWNER)  # locked before anyone can look for it
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _owner_is_dead(folder: Path) -> bool:
    """False where there is doubt: another user's folder, or one without an owner's file."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return False
        with open(folder / _OWNER, "rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def ask_for_token() -> None:
    """Set the environment for clusters of this process, which must be done before anything imports Ray."""
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN})
    _prepare()


def _prepare() -> None:
    """Set what Ray is to find in the environment, where the user has not."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def ray_version() -> str:
    """Of the Ray that is installed; whatever its import raises, where it cannot be imported."""
    _prepare()
    import ray

    return str(ray.__version__)


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
def joined(address: str, log: Path) -> Iterator[None]:
    """Be part of the cluster at `address` while the block runs. InputError where none answers."""
    _answers(address)
    _prepare()
    import ray

    try:
        with _talking_to(log):
            try:
                with _coming_up(log):
                    ray.init(address=address, **_QUIET)
            except Exception as error:  # Ray raises ConnectionError, ValueError, RuntimeError and more
                raise InputError(
                    f"--address {address}: no Ray cluster answers there ({error}); start one by `ray start --head`, "
                    "and give its token as RAY_AUTH_TOKEN where it asks for one"
                ) from error
            yield
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


def settled(settings: InferSettings, on_gpu: bool) -> InferSettings:
    """The settings with `auto` settled where the networks will run: on a machine of the joined cluster, not here. Waits
    for one where none is up yet.

    Raises what `hover_batch.model.predict.resolve` raises there.
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


@contextlib.contextmanager
def _coming_up(log: Path) -> Iterator[None]:
    """Until its level is set, Ray's core writes past Python to descriptor 2. That goes to `log`, as lines of JSON may
    be wanted on stderr; but not from a terminal, where bars are drawn meanwhile."""
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

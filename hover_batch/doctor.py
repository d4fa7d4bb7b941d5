"""Check whether this machine has what a run needs: PASS, WARN or FAIL, and the fix.

A check looks at one thing and does no real work. If it raises an exception, the result is FAIL with its message.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sqlite3
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from hover_batch.config import EngineSettings, Settings
from hover_batch.errors import HoverBatchError
from hover_batch.executor.disk_space import NEEDED_BYTES
from hover_batch.executor.resources import Node, Resources, engine_plan
from hover_batch.files import nearest_existing
from hover_batch.model.cache import VARIABLE, cache_folder
from hover_batch.model.package import find_package, load_tensors

GIB = 2**30
LOW_MEMORY = 4 * GIB
"""Memory below which there is a warning: a network, a reader and a region in post-processing need it together."""
LOW_ADDRESS_SPACE = 8 * GIB
"""Limit of the address space (ulimit -v) below which there is a warning: the libraries alone map most of it."""
LOW_DISK = 10 * GIB
"""Free space below which there is a warning: the prediction stores of one or two large slides fill it."""
RAY_FULL = 0.95
"""Fraction of the disk above which Ray stops spilling."""
LOW_FILES = 4096
"""Limit of open files below which there is a warning: Ray has hundreds of connections on a machine with many cores."""
_OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")
_EXTRAS = {
    "spatialdata": ("spatialdata", "export --to spatialdata and anndata"),
    "s3fs": ("s3", "slides at s3://…"),
    "tensorboard": ("train", "kd train's curves"),
}
"""Extra of hover-batch that installs a package, and its use, by package."""


@dataclass(frozen=True)
class Finding:
    """Result of a check."""

    status: Literal["PASS", "WARN", "FAIL"]
    """PASS; WARN for a problem that does not prevent a run; FAIL for one that does."""
    found: str
    """What was found, in words."""
    fix: str = ""
    """What to do about the problem; empty for PASS."""


@dataclass(frozen=True)
class Check:
    """Check of one thing that a run needs."""

    name: str
    """Name in the output."""
    inspect: Callable[[], Finding]
    """Function that does the check."""
    fix: str
    """What to do if `inspect` raises an exception."""

    def run(self) -> Finding:
        """Do the check and return what it found; FAIL with the first line of the message if it raises an exception.

        Python's warnings are suppressed in the whole process while the check runs.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self.inspect()
        except Exception as error:
            message = (str(error).strip() or "no message").splitlines()[0]
            if not isinstance(error, HoverBatchError):
                message = f"{type(error).__name__}: {message}"
            return Finding("FAIL", message, self.fix)


def checks(output: Path, *, start_ray: bool = False) -> list[Check]:
    """Return all checks of this machine in the order of the output, without running them.

    `output`: output folder of a run; it need not exist. `start_ray`: start Ray and run a task on it, instead of only
    importing it. In this case, run the checks in order, and before anything else in this process imports Ray.
    """
    reinstall = "reinstall hover-batch"
    temporary = Path(tempfile.gettempdir())
    return [
        Check("python", _python, "install Python 3.11 or newer"),
        Check("torch", _torch, f"{reinstall}: torch is broken"),
        Check("gpu", _gpu, "check the NVIDIA driver (nvidia-smi), or run with --device cpu"),
        Check("openslide", _openslide, "pip install --force-reinstall openslide-bin openslide-python"),
        Check("token", _token, "see deploy/README.md"),
        Check(
            "ray",
            _ray_starts if start_ray else _ray,
            "pip install --force-reinstall 'ray[default]', or run with --backend local",
        ),
        Check("/dev/shm", _shared_memory, "give the container --shm-size=2g"),
        Check("open files", _open_files, "ulimit -n 65536"),
        Check("output", lambda: _disk(output), "give another folder as --output"),
        Check("temporary", lambda: _disk(temporary), "set TMPDIR to another folder"),
        Check("memory", _memory, "give the process more memory"),
        Check("weights", _weights, reinstall),
        Check("cache", _cache, f"set {VARIABLE} to a folder that can be written"),
        Check("numba", _numba, "set NUMBA_CACHE_DIR to a folder that can be written"),
        Check("opencv", _opencv, "install libgl1 (apt-get install libgl1), or reinstall opencv-python"),
        Check("text", _text, "export LC_ALL=C.UTF-8"),
        Check("sqlite", _sqlite, "use a Python that is built with SQLite"),
        Check("extras", _extras, reinstall),
    ]


def _passed(found: str) -> Finding:
    return Finding("PASS", found)


def _warned(found: str, fix: str) -> Finding:
    return Finding("WARN", found, fix)


def _python() -> Finding:
    return _passed(f"{sys.version.split()[0]} at {sys.executable}")  # older versions cannot import this module


def _torch() -> Finding:
    import torch

    torch.zeros(1) + 1
    return _passed(f"{torch.__version__}, {f'for CUDA {cuda}' if (cuda := torch.version.cuda) else 'for the CPU only'}")


def _gpu() -> Finding:
    import torch

    number = Node.here().gpus
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable and not number:
        return _warned("none found: runs use the CPU", "fine for a few fields; for cohorts use a machine with a GPU")
    if not usable:
        reason = str(caught[0].message).splitlines()[0] if caught else "torch does not say why"
        built = torch.version.cuda
        if built is None:
            reason, fix = "this build of torch is for the CPU only", "install torch's build for CUDA"
        else:
            fix = f"install a driver for CUDA {built} or newer (nvidia-smi shows what it has), or give --device cpu"
        return Finding("FAIL", f"{number} found, but torch cannot use them: {reason}", fix)
    names = []
    for index in range(torch.cuda.device_count()):
        torch.zeros(1, device=f"cuda:{index}").add_(1).cpu()  # fails if this build of torch lacks code for the GPU
        card = torch.cuda.get_device_properties(index)
        names.append(f"{card.name}, {card.total_memory / GIB:.0f} GiB")
    return _passed("; ".join(names))


def _openslide() -> Finding:
    import openslide

    return _passed(f"library {openslide.__library_version__}, openslide-python {openslide.__version__}")


def _ray() -> Finding:
    from hover_batch.executor.cluster import ray_version

    return _passed(ray_version())


def _ray_starts() -> Finding:
    """Start Ray and do a task on it. Call it before anything else imports Ray, which reads its token on import."""
    from hover_batch.executor.cluster import ray_version
    from hover_batch.executor.map_tasks import TaskFailed, map_tasks, task_resources

    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        task_resources(EngineSettings(cpus=1, gpus=0), Path(folder, "ray.log")),
    ):
        ((_, result),) = map_tasks(_cores, [None], backend="ray")
    if isinstance(result, TaskFailed):
        raise result.error
    return _passed(f"{ray_version()}, started and did a task in {time.monotonic() - started:.0f} s")


def _token() -> Finding:
    """Check the token for joining a cluster; a cluster that a run starts makes its own."""
    mode = os.environ.get("RAY_AUTH_MODE", "")
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if os.environ.get("RAY_AUTH_TOKEN") or path.is_file():
        if mode != "token":
            return _warned("a token is set, but Ray does not ask for it", "export RAY_AUTH_MODE=token")
        return _passed("set, for clusters to join; runs on this machine make their own")
    if mode == "token" or os.environ.get("RAY_ADDRESS"):
        return _warned("no token to join a cluster with", "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=…")
    return _passed("each run on this machine makes its own; to join a cluster, set RAY_AUTH_TOKEN to its token")


def _shared_memory() -> Finding:
    wanted = engine_plan(Resources((Node.here(),)), Settings(), find_package("starter").card).object_store_bytes
    free = shutil.disk_usage("/dev/shm").free
    found = f"{free / GIB:.1f} GiB free, {wanted / GIB:.1f} wanted"
    if free < wanted:
        return _warned(f"{found}: Ray uses the disk instead, slowly", f"docker run --shm-size={-(-wanted // GIB) + 1}g")
    return _passed(found)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LOW_FILES:
        return _warned(f"{soft} at once", f"ulimit -n {max(hard, LOW_FILES) if hard > 0 else 65536}")
    return _passed("any number" if soft == resource.RLIM_INFINITY else f"{soft} at once")


def _nearest(folder: Path) -> tuple[Path, bool]:
    """Return a folder, or the nearest parent that exists, and whether it is a folder that can be written."""
    there = nearest_existing(folder)
    return there, there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _cache() -> Finding:
    """Check the cache of models; a run with an installed one does without it, but converts its network each time."""
    folder = cache_folder()
    there, is_writable = _nearest(folder)
    if not is_writable:
        return _warned(f"{folder}: {there} cannot be written", f"set {VARIABLE} to a folder that can be written")
    return _passed(str(folder))


def _disk(folder: Path) -> Finding:
    """Check the disk of a folder, or of the nearest parent that exists."""
    there, is_writable = _nearest(folder)
    if not is_writable:
        return Finding("FAIL", f"{there} cannot be written", "name another folder, or change its permissions")
    disk = shutil.disk_usage(there)
    found = f"{disk.free / GIB:.1f} GiB free at {there}"
    if disk.free < NEEDED_BYTES:
        return Finding("FAIL", found, "free some, or name a folder on another disk")
    if disk.free < LOW_DISK or disk.free < (1 - RAY_FULL) * disk.total:
        return _warned(f"{found}, {disk.free / disk.total:.0%} of the disk", "free some, or name a folder elsewhere")
    return _passed(found)


def _memory() -> Finding:
    here, cores = Node.here(), os.cpu_count() or 1
    found = f"cores: {here.cpus}{f' of {cores}' if here.cpus < cores else ''}, memory: {here.memory / GIB:.1f} GiB"
    free = here.memory
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = min(free, int(line.split()[1]) * 1024)
    found += f", {free / GIB:.1f} free"
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < LOW_ADDRESS_SPACE:
        return _warned(f"{found}, but the address space is limited to {limit / GIB:.1f} GiB", "ulimit -v unlimited")
    if free < LOW_MEMORY:
        return _warned(found, f"free some, or give the process {LOW_MEMORY // GIB} GiB or more")
    if here.cpus < 2:
        return _warned(found, "give it two cores or more: the network and the readers take turns on one")
    return _passed(found)


def _weights() -> Finding:
    starter = find_package("starter")
    load_tensors(starter)
    return _passed(f"starter is whole, sha256 {starter.sha256[:16]}…")


def _numba() -> Finding:
    """Check that numba caches compiled code; otherwise each process of a run would compile for seconds.

    numba raises an exception if it finds no folder for it.
    """
    from numba import njit

    return _passed(f"{version('numba')} keeps compiled code in {njit(cache=True)(_cores).stats.cache_path}")


def _opencv() -> Finding:
    import cv2

    installed = {name: found for name in _OPENCV if (found := _version(name))}
    if len(installed) > 1:
        both = ", ".join(f"{name} {found}" for name, found in installed.items())
        wanted = f"opencv-python=={installed.get('opencv-python', cv2.__version__)}"
        return _warned(
            f"{both} share one folder; {cv2.__version__} is what is imported",
            f"pip uninstall -y {' '.join(installed)} && pip install --no-deps {wanted}",
        )
    return _passed(cv2.__version__)


def _text() -> Finding:
    encodings = {"file names": sys.getfilesystemencoding(), "stdout": sys.stdout.encoding or "utf-8"}
    odd = [f"{name} {code}" for name, code in encodings.items() if code.lower().replace("-", "") != "utf8"]
    if odd:
        return _warned(f"not UTF-8: {', '.join(odd)}", "export LC_ALL=C.UTF-8, and unset PYTHONIOENCODING")
    return _passed("UTF-8")


def _sqlite() -> Finding:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        try:
            database.enable_load_extension(True)
        except (AttributeError, sqlite3.Error):
            return _warned(
                "this Python loads no extensions, so it cannot read an exported AnnotationStore",
                "read it with a Python built with --enable-loadable-sqlite-extensions (uv's and conda's are)",
            )
    return _passed(f"{sqlite3.sqlite_version}, loads extensions (to read an AnnotationStore)")


def _extras() -> Finding:
    there = [f"{name} {found}" for name in _EXTRAS if (found := _version(name))]
    absent = [(extra, use) for name, (extra, use) in _EXTRAS.items() if _version(name) is None]
    found = ", ".join(there) or "none"
    if not absent:
        return _passed(found)
    uses = "; ".join(f"{extra} for {use}" for extra, use in absent)
    return _passed(f"{found}. If wanted, pip install 'hover-batch[{','.join(extra for extra, _ in absent)}]': {uses}")


def _cores(_: None) -> int:
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""Faults planted in the processes of a Ray cluster.

Python imports this module at the start of each process if its folder is on PYTHONPATH. PLANTED names the folder with
the faults. A fault affects the slides whose id contains its name; with the suffix -once, only the first time.

- `sigsegv`, `post`, `finalize`: kill the process that reads, post-processes or finalizes the slide.
- `torn-shard`, `torn-marker`, `torn-part`, `torn-table`, `torn-done`: kill the process that has written such a file and
  has not yet renamed it into place.
- `slow`: sleep at each step.
- `memory`: raise MemoryError in post-processing.
- `hog`, `gorge`: take memory until the process is killed, in post-processing or in inference.
- `late-shard`, `late-part`: show a shard after its marker, or a part after the next stage has begun, as a network file
  system may.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

FOLDER = os.environ.get("PLANTED")


def asked(fault, name):
    """Whether `name` asks for `fault`; with -once, whether it has not had it before, by a file in FOLDER."""
    if f"{fault}-once" in name:
        try:
            os.close(os.open(Path(FOLDER) / f"{fault}-{name}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True
    return fault in name


def strike(fault, name, how=signal.SIGSEGV):
    """Crash, as libopenslide may, if `name` asks for `fault`."""
    if asked(fault, name):
        os.kill(os.getpid(), how)
        time.sleep(60)


def dawdle(name):
    if "slow" in name:
        time.sleep(0.3)


def plant_reader(module):
    read = module.SlideReader.read

    def planted(self, box, grid):
        strike("sigsegv", self._path.stem)
        dawdle(self._path.stem)
        return read(self, box, grid)

    module.SlideReader.read = planted


def plant_pipeline(module):
    post, finalize, infer, seen = module.post, module.finalize, module.infer, module._can_be_read

    def planted_seen(unit, work, store):
        return seen(unit, work, store) and not asked("late-shard", work.record.slide_id)

    def planted_infer(unit, work, *rest):
        if asked("gorge", work.record.slide_id):
            take_memory()
        return infer(unit, work, *rest)

    def planted_post(unit, work, store):
        name = work.record.slide_id
        strike("post", name)
        dawdle(name)
        if asked("memory", name):
            raise MemoryError("planted")
        if asked("hog", name):
            take_memory()
        return post(unit, work, store)

    def planted_finalize(work, reader, seconds):
        strike("finalize", work.record.slide_id)
        dawdle(work.record.slide_id)
        if asked("late-part", work.record.slide_id):
            hide_for_a_while(work.layout.part(work.units[0].column, work.units[0].row))
        return finalize(work, reader, seconds)

    module.post, module.finalize, module.infer, module._can_be_read = (
        planted_post,
        planted_finalize,
        planted_infer,
        planted_seen,
    )


def hide_for_a_while(path):
    hidden = path.with_name(f".{path.name}.hidden")
    path.rename(hidden)
    # In a process of its own, since Ray ends idle workers.
    subprocess.Popen(["sh", "-c", 'sleep 1.5; mv "$0" "$1"', hidden, path], start_new_session=True)


def take_memory():
    """Take up to 12 GB in a minute, unless the process is killed before."""
    held = []
    for _ in range(48):
        held.append(bytearray(b"x") * (256 << 20))
        time.sleep(1.25)
    raise RuntimeError("the process took 12 GB and was not killed")


FILES = {
    "torn-shard": "/predictions.zarr/c/",
    "torn-marker": "/markers/.",
    "torn-part": "/parts/.",
    "torn-table": "/.nuclei.parquet.",
    "torn-done": "/.slide.json.",
}


def plant_files(module):
    sync = module._sync

    def planted_sync(path):
        if path.suffix == ".partial" and (parts := path.parts).count("slides"):
            name = parts[len(parts) - parts[::-1].index("slides")]
            for fault, where in FILES.items():
                if where in str(path):
                    strike(fault, name, signal.SIGKILL)
        sync(path)

    module._sync = planted_sync


PLANTS = {
    "hover_batch.slide.reader": plant_reader,
    "hover_batch.pipeline": plant_pipeline,
    "hover_batch.files": plant_files,
}


class Planter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the modules of PLANTS, then plants their faults."""

    def find_spec(self, name, path, target=None):
        if name not in PLANTS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        self.loaders[name] = spec.loader
        spec.loader = self
        return spec

    loaders = {}

    def create_module(self, spec):
        return self.loaders[spec.name].create_module(spec)

    def exec_module(self, module):
        self.loaders[module.__name__].exec_module(module)
        PLANTS[module.__name__](module)


if FOLDER:
    sys.meta_path.insert(0, Planter())

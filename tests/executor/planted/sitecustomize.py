"""Faults planted in the processes of a Ray cluster: Python imports this at the start of each, where PLANTED names a
folder and this one stands on PYTHONPATH.

A fault strikes a slide whose id has its name in it: `sigsegv` kills whoever reads it, `sigsegv-once` the first time
only; `post-once`, `post` and `finalize-once` kill the process that post-processes or finalizes it. `slow-read` sleeps.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time
from pathlib import Path

FOLDER = os.environ.get("PLANTED")


def strike(fault, name):
    """Die by SIGSEGV, as libopenslide does, if `name` asks for `fault`; with -once if no one has died of it before."""
    if f"{fault}-once" in name:
        try:
            os.close(os.open(Path(FOLDER) / f"{fault}-{name}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    elif fault not in name:
        return
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def plant_reader(module):
    read = module.GridReader.read

    def planted(self, box, grid):
        strike("sigsegv", self._path.stem)
        if "slow-read" in self._path.stem:
            time.sleep(0.2)
        return read(self, box, grid)

    module.GridReader.read = planted


def plant_pipeline(module):
    post, finalize = module.post, module.finalize

    def planted_post(unit, work, store):
        strike("post", work.record.slide_id)
        return post(unit, work, store)

    def planted_finalize(work, reader, seconds):
        strike("finalize", work.record.slide_id)
        return finalize(work, reader, seconds)

    module.post, module.finalize = planted_post, planted_finalize


PLANTS = {"hover_batch.slide.reader": plant_reader, "hover_batch.pipeline": plant_pipeline}


class Planter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the modules of PLANTS as they are, then plants."""

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

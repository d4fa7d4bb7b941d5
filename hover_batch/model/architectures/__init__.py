"""Architectures of networks, one per file, which builds the network and recognises its published checkpoints.

An architecture is in the file NAME.py of this folder, or in another installed distribution, as the module of an entry
point NAME in the group `hover_batch.architectures`. The file defines `ARCHITECTURES`, a tuple of
`protocol.Architecture`, whose names are NAME or begin with `NAME-`, so that only the file of the requested one is
imported. The files import torch; this module does not.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hover_batch.errors import PackageError

if TYPE_CHECKING:
    from hover_batch.model.architectures.protocol import Architecture

GROUP = "hover_batch.architectures"
"""Group of the entry points of architectures in other distributions."""


def architecture(name: str) -> Architecture:
    """Return the architecture with the name `name`, as in model cards. Its file and torch are imported.

    PackageError if there is no such architecture.
    """
    module = _module_of(name)
    for found in _held_by(module) if module else ():
        if found.name == name:
            return found
    raise _unknown(name)


def check_installed(name: str) -> None:
    """Check that the file of the architecture `name` is installed, without importing it.

    PackageError if it is not.
    """
    if _module_of(name) is None:
        raise _unknown(name)


def architectures() -> list[Architecture]:
    """Return all architectures, sorted by name. Their files and torch are imported; this takes seconds."""
    found = [found for module in _modules().values() for found in _held_by(module)]
    return sorted(found, key=lambda found: found.name)


def file_of(name: str) -> Path | None:
    """Return the path of the Python file of the architecture `name`, without importing it.

    None if the architecture is not known or has no file.
    """
    module = _module_of(name)
    spec = find_spec(module) if module else None
    return Path(spec.origin) if spec and spec.origin else None


def _modules() -> dict[str, str]:
    """Return the modules of all architectures, by the first part of the architectures' names."""
    others = {point.name: point.value for point in entry_points(group=GROUP)}
    own = [module.name for module in pkgutil.iter_modules(__path__) if module.name != "protocol"]
    return others | {name.replace("_", "-"): f"{__name__}.{name}" for name in own}


def _module_of(name: str) -> str | None:
    return next((module for start, module in _modules().items() if f"{name}-".startswith(f"{start}-")), None)


def _unknown(name: str) -> PackageError:
    known = ", ".join(found.name for found in architectures())
    return PackageError(
        f"architecture {name[:100]!a} is not known; install the Python package that contains it "
        f"(docs/architectures.md), or use a model of another architecture; known are {known}"
    )


def _held_by(module: str) -> tuple[Architecture, ...]:
    found: tuple[Architecture, ...] = import_module(module).ARCHITECTURES
    return found

"""requirements.lock, from which images and clusters install, matches pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
REMAKE = "remake it: uv lock && uv export --no-emit-project --no-dev -o requirements.lock"


def _pinned() -> dict[str, tuple[str, int]]:
    """Name → (version, number of hashes)."""
    blocks = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text())
    found = (re.match(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)", block) for block in blocks)
    return {
        canonicalize_name(match["name"]): (match["version"], block.count("--hash=sha256:"))
        for match, block in zip(found, blocks, strict=True)
        if match
    }


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    left_out = {Requirement(text).name for text in settings["tool"]["uv"]["override-dependencies"]}
    assert left_out == {"opencv-python-headless"}  # by a marker that never holds
    pinned = _pinned()
    for requirement in map(Requirement, settings["project"]["dependencies"]):
        if requirement.name in left_out:
            continue
        assert canonicalize_name(requirement.name) in pinned, f"{requirement} is not locked; {REMAKE}"
        version, _ = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version}; {REMAKE}"


def test_every_pin_is_hashed_and_no_address_is_recorded() -> None:
    pinned = _pinned()
    assert len(pinned) > 100  # with what the direct dependencies bring
    assert [name for name, (_, hashes) in pinned.items() if hashes == 0] == []
    assert "://" not in (ROOT / "requirements.lock").read_text()

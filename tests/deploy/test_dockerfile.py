"""Container image: its user and content, and an environment that works without a home folder."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
from deploy_commands import DEPLOY, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments), in order; comments left out, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1].strip()) for line in lines]


def arguments(name: str) -> list[str]:
    return [text for instruction, text in instructions() if instruction == name]


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for text in arguments("ENV") for word in shlex.split(text))


def test_it_is_run_by_a_user_who_is_not_root() -> None:
    assert arguments("USER") == ["1000:1000"]
    names = [name for name, _ in instructions()]
    assert "RUN" not in names[names.index("USER") :]


def test_all_that_is_copied_is_there_and_is_all_that_a_wheel_needs() -> None:
    copied = [source for text in arguments("COPY") for source in text.split()[:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    project = PROJECT["project"]
    needed = {*PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], "pyproject.toml", project["readme"]}
    licences = {Path(name).parts[0] for name in project["license-files"]}
    assert needed | licences | {"requirements.lock"} == set(copied)
    assert arguments("ADD") == []


def test_it_installs_the_lock_by_hashes_and_then_nothing_but_the_project() -> None:
    installs = [text for text in arguments("RUN") if "pip" in text]
    assert installs == [
        "pip install --no-cache-dir --require-hashes --no-deps -r requirements.lock",
        "pip install --no-cache-dir --no-deps .",
    ]


def test_the_lock_brings_rays_job_server() -> None:
    """`ray job submit` and KubeRay talk to it; it comes with ray[default]."""
    locked = set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    wanted = map(Requirement, requires("ray") or [])
    missing = [
        r.name
        for r in wanted
        if r.marker and r.marker.evaluate({"extra": "default"}) and not r.marker.evaluate({"extra": ""})
        if canonicalize_name(r.name) not in locked
    ]
    assert missing == [], "remake the lock, see CONTRIBUTING.md"


def test_it_starts_the_projects_own_command() -> None:
    assert arguments("ENTRYPOINT") == ['["hover-batch"]']
    assert "hover-batch" in PROJECT["project"]["scripts"]


def run_in_its_environment(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """hover-batch in `folder` with a tiny cohort, in the image's environment, /tmp being that folder."""
    Image.fromarray(np.full((64, 64, 3), 230, np.uint8)).save(folder / "field.png")
    (folder / "cohort.csv").write_text("path,mpp\nfield.png,0.25\n")
    image = {name: re.sub(r"^/tmp\b", str(folder), value) for name, value in environment().items()}
    environ = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"} | image
    script = Path(sys.executable).with_name("hover-batch")
    return subprocess.run([script, *words], cwd=folder, env=environ, capture_output=True, text=True)


def test_all_that_it_writes_to_lies_in_tmp() -> None:
    """Which is there in every container, also where the root file system is read-only, and whoever runs it."""
    homes = {name: environment()[name] for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "NUMBA_CACHE_DIR")}
    assert [name for name, path in homes.items() if not f"{path}/".startswith("/tmp/")] == []
    assert environment()["LOGNAME"]  # for those who ask for the name of a user id that has none


def test_its_environment_plans_a_cohort(tmp_path: Path) -> None:
    plan = run_in_its_environment(tmp_path, "plan", "cohort.csv")
    assert plan.returncode == 0, plan.stderr


@pytest.mark.slow
def test_its_environment_segments_a_cohort_and_keeps_kernels_in_tmp(tmp_path: Path) -> None:
    words = ["segment", "cohort.csv", "-o", "out", "--backend", "local", "--tissue", "all", "--device", "cpu"]
    run = run_in_its_environment(tmp_path, *words)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out/slides/field/nuclei.parquet").exists()
    assert list((tmp_path / "cache/numba").rglob("*.nbi"))

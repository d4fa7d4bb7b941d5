"""Installations, homes and user ids as in containers: read-only, missing, without a name. Paths without a place."""

from __future__ import annotations

import getpass
import os
import pwd
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.environment import complete_environment

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = ("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "MPLCONFIGDIR", "LOGNAME")
UID = 54321
READ_ONLY = """
for folder in "$1" "$2"; do mount --bind "$folder" "$folder" && mount -o remount,bind,ro "$folder" || exit 1; done
cd "$3" && shift 3 && exec unshare --user --map-user="$UNNAMED" "$@"
"""
"""A shell script: the folders $1 and $2 are read-only, $3 is the working directory, an unnamed user runs the rest."""
PROBE = """
import getpass, kd.training.targets, os  # the module of kd imports numba before anything else of ours
from hover_batch.nuclei.energy import _mirrored
assert _mirrored(-2, 5) == 2
print(os.getuid(), getpass.getuser(), _mirrored.stats.cache_path)
from hover_batch.cli import app
app(["plan", "cohort.csv"])
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary directory of a process without a home that can be written, whoever runs the tests."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nohome")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def _private(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700 and found.st_uid == os.getuid()


def test_caches_go_to_a_private_folder_where_the_home_cannot_be_written(temporary: Path) -> None:
    complete_environment()
    folder = temporary / f"hover-batch-cache-{os.getuid()}"
    assert _private(folder)
    assert os.environ["NUMBA_CACHE_DIR"] == str(folder / "numba")
    assert os.environ["MPLCONFIGDIR"] == str(folder / "matplotlib")
    assert os.environ["HOME"] == "/proc/nohome"
    complete_environment()
    assert list(temporary.iterdir()) == [folder]


def test_nothing_changes_where_the_home_can_be_written(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(temporary / "home"))
    before = dict(os.environ)
    complete_environment()
    assert os.environ == before
    assert [path.name for path in temporary.iterdir()] == ["home"]


def test_what_the_user_has_set_stays(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/mine")
    complete_environment()
    assert os.environ["NUMBA_CACHE_DIR"] == "/mine"
    assert "MPLCONFIGDIR" in os.environ


@pytest.mark.parametrize("kind", ["link", "open", "file"])
def test_a_planted_folder_is_not_used(temporary: Path, kind: str) -> None:
    planted, elsewhere = temporary / f"hover-batch-cache-{os.getuid()}", temporary / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if kind == "link":
        planted.symlink_to(elsewhere)
    elif kind == "open":
        planted.mkdir()
        planted.chmod(0o777)
    else:
        planted.touch()
    complete_environment()
    used = Path(os.environ["NUMBA_CACHE_DIR"]).parent
    assert used.parent == temporary and used not in (planted, elsewhere)
    assert _private(used)


def test_a_user_without_name_and_home_gets_both(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> pwd.struct_passwd:
        raise KeyError("getpwuid(): uid not found")

    for name in ("HOME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    complete_environment()
    assert getpass.getuser() == str(os.getuid())
    assert _private(Path.home())


def test_no_temporary_directory_is_no_error(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    complete_environment()
    assert "NUMBA_CACHE_DIR" not in os.environ


def test_a_read_only_installation_plans_for_a_user_without_name_and_home(tmp_path: Path) -> None:
    assert cv2.imwrite(str(tmp_path / "tile.png"), np.full((64, 64, 3), 200, np.uint8))
    (tmp_path / "cohort.csv").write_text("path,mpp\ntile.png,0.25\n")
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HOME": "/proc/nohome",
        "TMPDIR": str(tmp_path),
        "UNNAMED": str(UID),
    }

    def read_only(*command: str) -> subprocess.CompletedProcess[str]:
        words = ["unshare", "-rm", "sh", "-c", READ_ONLY, "sh", str(ROOT), sys.prefix, str(tmp_path), *command]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)

    try:
        allowed = read_only("sh", "-c", f"! touch {ROOT}/written && touch {tmp_path}/written")
    except FileNotFoundError:
        pytest.skip("there is no `unshare` here")
    if allowed.returncode:
        pytest.skip(f"user and mount namespaces are not permitted here: {allowed.stderr.strip()}")
    ended = read_only(sys.executable, "-c", PROBE)
    assert ended.returncode == 0, ended.stderr
    assert f"{UID} {UID} {tmp_path}/hover-batch-cache-{UID}/numba/" in ended.stdout
    assert "1 slide to run" in ended.stdout
    assert ended.stderr == ""


@pytest.mark.parametrize("words", [["segment", "--example", "-o", ""], ["report", ""], ["status", ""], ["view", ""]])
def test_an_empty_path_is_not_the_current_folder(words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "a path is empty" in result.stderr


def test_a_removed_folder_is_no_place_to_start_from(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hover_batch", "status", "out"]
    shell = ["sh", "-c", 'rmdir "$PWD" && "$@"', "sh", *command]
    ended = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("Error: the current folder does not exist any more")
    assert len(ended.stderr.splitlines()) == 1


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = CliRunner().invoke(app, ["status", "~/none"])
    assert result.exit_code == 2 and f"{tmp_path}/none" in result.stderr

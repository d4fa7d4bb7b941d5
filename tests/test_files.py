"""Atomic and durable writing of files, and reading of JSON."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hover_batch.errors import InputError
from hover_batch.files import (
    check_output_file,
    given_path,
    leftovers,
    read_whole,
    replacing,
    replacing_folder,
    sha256_file,
    sweeping,
    to_json,
    write_atomically,
    write_first,
)


def test_text_is_utf8_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, b"longer than what follows")
    write_atomically(path, "µm\n")
    assert path.read_bytes() == b"\xc2\xb5m\n"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_the_mask_of_the_process_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_failed_write_leaves_the_old_content_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: bytes | None
) -> None:
    path = tmp_path / "a.json"
    if old is not None:
        path.write_bytes(old)

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new" * 1000)
    assert (path.read_bytes() if path.exists() else None) == old
    assert list(leftovers(path)) == []


@pytest.mark.parametrize("raised", [OSError(errno.EFBIG, "File too large"), OSError(errno.EIO, "I/O", "other")])
def test_a_write_that_names_no_file_gets_its_name(tmp_path: Path, raised: OSError) -> None:
    """Python names a file that it cannot open, but not one that it cannot write."""
    path, given = tmp_path / "a.json", raised.filename
    with pytest.raises(OSError) as caught, replacing(path):
        raise raised
    assert caught.value.filename == (given or str(path))


@pytest.mark.parametrize("old", [True, False])
def test_a_folder_is_replaced_whole(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "a.zarr"
    for number in range(2 if old else 1):
        with replacing_folder(path) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / str(number)).touch()
        assert [file.name for file in path.rglob("*")] == ["inner", str(number)]
    with pytest.raises(OSError, match="No space"), replacing_folder(path) as temporary:
        temporary.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [file.name for file in path.rglob("*")] == ["inner", str(number)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_makes_no_folder_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    path.mkdir()
    with pytest.raises(FileNotFoundError, match=f"no folder was made.*{path}"), replacing_folder(path):
        pass
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way_is_named(tmp_path: Path) -> None:
    path = tmp_path / "summary.csv"
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=f"'{path}'$"):
        write_atomically(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "link"])
def test_a_failed_first_write_leaves_the_place_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "a.json"

    def fail(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="Input/output"):
            write_first(path, b"new")
    assert list(tmp_path.iterdir()) == []
    assert write_first(path, b"new")


KILLED_WRITE = """
import os, signal, sys
from pathlib import Path
from hover_batch.files import write_atomically, write_first
step, call, path = sys.argv[1:]
setattr(os, step, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
{"atomically": write_atomically, "first": write_first}[call](Path(path), b"new" * 1000)
"""


@pytest.mark.parametrize(("step", "call"), [("fsync", "atomically"), ("replace", "atomically"), ("link", "first")])
def test_a_kill_leaves_no_part_under_the_name(tmp_path: Path, step: str, call: str) -> None:
    path = tmp_path / "a.json"
    if call == "atomically":
        path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED_WRITE, step, call, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (path.read_bytes() if path.exists() else None) == (b"old" if call == "atomically" else None)
    assert len(list(leftovers(path))) == 1


def test_the_content_is_on_disk_before_its_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    for name in ("fsync", "replace", "link"):
        original = getattr(os, name)

        def note(*args: object, name: str = name, original: object = original) -> None:
            steps.append(name)
            original(*args)  # type: ignore[operator]

        monkeypatch.setattr(os, name, note)
    write_atomically(tmp_path / "a", b"1")
    write_first(tmp_path / "b", b"1")
    assert steps == ["fsync", "replace", "fsync", "fsync", "link", "fsync"]


@settings(max_examples=10)
@given(st.integers(2, 8))
def test_the_first_writer_wins(tmp_path_factory: pytest.TempPathFactory, writers: int) -> None:
    path = tmp_path_factory.mktemp("first") / "a.json"
    ready, won = threading.Barrier(writers), [False] * writers
    seen: list[bytes] = [b""] * writers

    def write(number: int) -> None:
        ready.wait()
        won[number] = write_first(path, b"%d " % number * 5000)
        seen[number] = path.read_bytes()

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won.count(True) == 1
    assert set(seen) == {b"%d " % won.index(True) * 5000}
    assert list(path.parent.iterdir()) == [path]


def test_a_link_that_was_made_though_the_answer_says_it_exists_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def repeated(*args: str) -> None:
        link(*args)
        link(*args)

    monkeypatch.setattr(os, "link", repeated)
    assert write_first(tmp_path / "a", b"1")
    assert not write_first(tmp_path / "a", b"2")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_json_is_the_same_whatever_the_order() -> None:
    assert to_json({"b": 1, "a": {"d": 2, "c": "µ"}}) == to_json({"a": {"c": "µ", "d": 2}, "b": 1})
    with pytest.raises(ValueError, match="JSON"):
        to_json(float("nan"))


def test_sha256_of_a_file_larger_than_a_buffer(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(content)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_what_killed_writes_left_is_swept_unless_another_writes_there(tmp_path: Path) -> None:
    path, others = tmp_path / "a", tmp_path / ".b.0.partial"
    others.touch()
    (tmp_path / ".a.0.partial").touch()
    (tmp_path / ".a.1.partial" / "deep").mkdir(parents=True)
    with sweeping(path):
        assert list(leftovers(path)) == []
        with replacing(path) as mine:
            mine.write_bytes(b"1")
            with sweeping(path), replacing(path) as theirs:
                theirs.write_bytes(b"2")
            assert mine.exists()
    assert path.read_bytes() == b"1"
    assert sorted(tmp_path.iterdir()) == [others, path]


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    for path in (tmp_path / "pipe", tmp_path / "stdout"):
        with pytest.raises(OSError, match="is a device or a pipe, not a file; name a file"):
            write_atomically(path, b"")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "stdout").is_symlink()


def test_a_path_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert given_path(str(tmp_path / "none" / "x")) == tmp_path / "none" / "x"
    for text, message in (("", "empty"), ("a\0", "cannot be a path"), ("x" * 300, "too long"), ("loop", "symbolic")):
        with pytest.raises(InputError, match=message):
            given_path(str(tmp_path / text) if text == "loop" else text)


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a device or a pipe"):
        read_whole(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("table.parquet", "must end in .csv; change the ending"),
        ("", "is a folder; give the path of a file"),
        ("folder.csv", "is a folder; give the path of a file"),
        ("none/x.csv", "/none does not exist; create it first"),
        ("file.csv/x.csv", "file.csv does not exist"),
        ("pipe.csv", "is a device or a pipe"),
        ("/dev/stdout.csv/x.csv", "does not exist"),
        ("/proc/x.csv", "cannot be written (No such file or directory)"),
        (f"{'x' * 250}.csv", "cannot be written (File name too long)"),
        ("\udcff.csv", "cannot be written (its name is not valid UTF-8; rename it)"),
        ("a\0b.csv", "cannot be written"),
        ("run/slides.csv", "is in {}/run, which must not change; name another file"),
        ("link/slides.csv", "is in {}/run, which must not change"),
        ("file.csv", "is {}/file.csv, which must not change"),
    ],
)
def test_output_files_are_checked_before_the_work(tmp_path: Path, name: str, message: str) -> None:
    for folder in ("folder.csv", "run"):
        (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "file.csv").write_text("x")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(InputError) as raised:
        check_output_file("-o", tmp_path / name, (".csv",), [tmp_path / "run", tmp_path / "file.csv"])
    assert message.replace("{}", str(tmp_path)) in str(raised.value)
    assert len(list(tmp_path.rglob("*"))) == 5 and (tmp_path / "file.csv").read_text() == "x"


@pytest.mark.parametrize(
    ("name", "refused"),
    [("run.json", True), ("slides/a/x.json", True), ("slides/new.json", False), ("mine.json", False)],
)
def test_files_of_a_run_are_not_replaced(tmp_path: Path, name: str, refused: bool) -> None:
    for existing in ("run.json", "slides/a/x.json", "mine.json"):
        (tmp_path / existing).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / existing).write_text("{}")
    with pytest.raises(InputError, match="belongs to the run in") if refused else nullcontext():
        check_output_file("--json", tmp_path / name, (".json",))


def test_an_output_file_may_exist_or_need_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("old")
    check_output_file("-o", tmp_path / "x.csv", (".csv",))
    check_output_file("-o", tmp_path / "new" / "X.CSV", (".csv",), make_folder=True)
    assert (tmp_path / "x.csv").read_text() == "old" and not any((tmp_path / "new").iterdir())

"""Slides in a bucket, with a real server on loopback: their properties, and their copies on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bucket
import fsspec
import numpy as np
import pytest

from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.errors import InputError, ScratchFull, SlideError
from hover_batch.geometry import Grid, Mpp
from hover_batch.slide import staging
from hover_batch.slide.fingerprint import fingerprint
from hover_batch.slide.reader import open_slide
from hover_batch.slide.remote import remote_info, require_package
from hover_batch.slide.staging import Copies

ROOT = Path(__file__).resolve().parents[2]
MPP = Mpp(0.5, 0.5)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setattr(staging, "FIRST_WAIT_S", 0.01)
    with bucket.s3_server(monkeypatch, tmp_path) as address:
        yield address


@pytest.fixture
def copies(tmp_path: Path) -> Copies:
    (tmp_path / "scratch").mkdir()
    return Copies.of_run(tmp_path / "out", str(tmp_path / "scratch"))


def record(url: str) -> SlideRecord:
    return SlideRecord("one", Url(url), row=2, mpp=MPP)


def planned(url: str) -> str:
    return remote_info(Url(url), MPP).fingerprint


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and not path.name.endswith("lock")}


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1, 5_000_001])
def test_the_same_bytes_have_the_same_fingerprint(server: str, tmp_path: Path, size: int) -> None:
    (tmp_path / "a.svs").write_bytes(noise(size))
    bucket.put("slides", {"x/a.svs": noise(size)})
    info = remote_info(Url("s3://slides/x/a.svs"), MPP)
    assert (info.size, info.fingerprint) == (size, fingerprint(tmp_path / "a.svs", MPP))


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("s3://slides/scan/", ["scan/2.dcm", "scan/10.dcm", "scan/sub/1.dcm"]),
        ("s3://slides/m.mrxs", ["m.mrxs", "m/1.dat"]),
    ],
    ids=["DICOM folder", "MRXS"],
)
def test_a_slide_of_several_files_is_copied_whole(
    server: str, copies: Copies, tmp_path: Path, url: str, names: list[str]
) -> None:
    contents = {name: noise(1000 + i, i) for i, name in enumerate(names)}
    bucket.put("slides", contents | {"other.svs": b"not of this slide"})
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert planned(url) == fingerprint(tmp_path / Url(url).name, MPP)
    with copies.staged(record(url), planned(url)) as here:
        assert {n: (here.file.parent / n).read_bytes() for n in names} == contents
        assert files_in(tmp_path / "scratch") == {Path(name).name for name in names}


def test_a_real_slide_reads_as_from_disk(server: str, copies: Copies, data: Path) -> None:
    path = data / "slides" / "CMU-1-Small-Region.svs"
    bucket.put("slides", {path.name: path.read_bytes()})
    there = SlideRecord("one", Url(f"s3://slides/{path.name}"), row=2)
    told = remote_info(Url(f"s3://slides/{path.name}"), None)
    with open_slide(SlideRecord("one", path, row=2)) as local:
        grid = Grid.over(local.info.level0, local.info.mpp, MPP.x)
        with copies.staged(there, told.fingerprint) as here, open_slide(here) as reader:
            assert reader.info == local.info
            assert np.array_equal(reader.read(grid.size.box, grid), local.read(grid.size.box, grid))


def test_what_is_not_there_and_what_may_not_be_read(server: str) -> None:
    bucket.put("slides", {"a.svs": b"a"})
    for url in ("s3://slides/b.svs", "s3://nowhere/a.svs"):
        with pytest.raises(InputError, match=f"{url}: no such file"):
            remote_info(Url(url), None)
    bucket.deny(server)
    try:
        with pytest.raises(InputError, match="s3://slides/a.svs: access denied.*AWS_ACCESS_KEY_ID") as denied:
            remote_info(Url("s3://slides/a.svs"), None)
        assert bucket.SECRET not in str(denied.value)
    finally:
        bucket.let_in(server)


def test_a_folder_of_slides_is_no_slide(server: str) -> None:
    bucket.put("slides", {"x/a.svs": b"a", "x/b.TIF": b"b"})
    for url in ("s3://slides", "s3://slides/x/"):
        with pytest.raises(InputError, match=rf"^{url}: is a folder of slides \(.*b\.TIF\), not one slide"):
            remote_info(Url(url), None)


def test_names_with_the_mark_of_fragments_are_read_and_kept(server: str, copies: Copies) -> None:
    bucket.put("slides", {"a b #1.svs": noise(1000)})
    url = Url("s3://slides/a b #1.svs")
    assert Url.of(str(url)) == url and url.name == "a b #1.svs"
    with copies.staged(record(url.text), planned(url.text)) as here:
        assert here.file.read_bytes() == noise(1000)


def test_a_web_server_that_refuses_or_is_not_there_is_no_missing_file(server: str) -> None:
    bucket.put("slides", {"a.svs": b"a"})
    with pytest.raises(InputError, match="no such file"):
        remote_info(Url(f"http://{server}/slides/b.svs"), None)
    with pytest.raises(SlideError, match=r"^http://127\.0\.0\.1:9/a\.svs: cannot be fetched: Cannot connect"):
        remote_info(Url("http://127.0.0.1:9/a.svs"), None)
    bucket.deny(server)
    try:
        with pytest.raises(InputError, match="access denied"):
            remote_info(Url(f"http://{server}/slides/a.svs"), None)
    finally:
        bucket.let_in(server)


def test_without_credentials(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("slides", {"a.svs": b"a"})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bucket.use(monkeypatch, server)
    with pytest.raises(InputError, match="give credentials in the environment"):
        remote_info(Url("s3://slides/a.svs"), None)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"pip install 'hover-batch\[s3\]'"):
        require_package(Url("s3://slides/a.svs"))
    with pytest.raises(InputError, match="does not support storage of the kind s4://; correct the path"):
        require_package(Url("s4://slides/a.svs"))


STAGE = """
import sys
from pathlib import Path
from hover_batch.cohort.record import SlideRecord, Url
from hover_batch.geometry import Mpp
from hover_batch.slide.staging import Copies
out, scratch, url, planned = sys.argv[1:]
record = SlideRecord("one", Url(url), row=2, mpp=Mpp(0.5, 0.5))
print("ready", flush=True)
sys.stdin.readline()
with Copies.of_run(Path(out), scratch).staged(record, planned) as here:
    print(here.file.stat().st_ino, flush=True)
sys.stdin.readline()
"""


def stage(out: Path, scratch: Path, url: str) -> subprocess.Popen[str]:
    """A process of a run: copies the slide when it gets a line, and then lives until it gets another."""
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(out), str(scratch), url, planned(url)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def told(process: subprocess.Popen[str]) -> str:
    assert process.stdin and process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def end(process: subprocess.Popen[str], kill: bool = False) -> None:
    if kill:
        process.send_signal(signal.SIGKILL)
    process.communicate("\n")


def test_the_processes_of_a_machine_share_one_copy(server: str, copies: Copies, tmp_path: Path) -> None:
    bucket.put("slides", {"a.svs": noise(8 << 20)})
    url = "s3://slides/a.svs"
    processes = [stage(tmp_path / "out", tmp_path / "scratch", url) for _ in range(3)]
    try:
        with ThreadPoolExecutor(3) as pool:
            inodes = set(pool.map(told, processes))
    finally:
        for process in processes:
            end(process)
    assert len(inodes) == 1 and files_in(tmp_path / "scratch") == {"a.svs"}
    copies.open()
    copies.release("one")
    assert files_in(tmp_path / "scratch") == set()
    copies.close()
    assert {path.name for path in (tmp_path / "scratch").rglob("*")} == {f"hover-batch-{os.getuid()}"}


def test_what_a_killed_run_left_is_swept_and_a_live_one_is_not(server: str, tmp_path: Path) -> None:
    scratch, url = tmp_path / "scratch", "s3://slides/a.svs"
    scratch.mkdir()
    bucket.put("slides", {"a.svs": noise(5000)})
    process = stage(tmp_path / "out", scratch, url)
    try:
        assert told(process)
        second = Copies.of_run(tmp_path / "second", str(scratch))
        second.open()
        assert files_in(scratch) == {"a.svs"}
        second.close()
    finally:
        end(process, kill=True)
    assert files_in(scratch) == {"a.svs"}
    third = Copies.of_run(tmp_path / "third", str(scratch))
    third.open()
    assert files_in(scratch) == set()
    third.close()


def test_the_same_run_goes_on_with_what_it_had_copied(server: str, copies: Copies, tmp_path: Path) -> None:
    url = "s3://slides/a.svs"
    bucket.put("slides", {"a.svs": noise(5000)})
    process = stage(tmp_path / "out", tmp_path / "scratch", url)
    inode = told(process)
    end(process, kill=True)
    with copies.staged(record(url), planned(url)) as here:
        assert here.file.stat().st_ino == int(inode)


@pytest.mark.parametrize("now", [noise(3000), noise(5000, 1)], ids=["truncated", "other bytes"])
def test_an_object_that_changed_since_the_plan_fails(server: str, copies: Copies, tmp_path: Path, now: bytes) -> None:
    url = "s3://slides/a.svs"
    bucket.put("slides", {"a.svs": noise(5000)})
    before = planned(url)
    bucket.put("slides", {"a.svs": now})
    with (
        pytest.raises(SlideError, match=f"{url}: the copy differs from .*4 attempts"),
        copies.staged(record(url), before),
    ):
        pass
    assert files_in(tmp_path / "scratch") == set()


def test_an_object_that_went_since_the_plan_fails(server: str, copies: Copies) -> None:
    bucket.put("slides", {"a.svs": noise(5000)})
    before = planned("s3://slides/a.svs")
    bucket.reset(server)
    with pytest.raises(InputError, match="no such file"), copies.staged(record("s3://slides/a.svs"), before):
        pass


@pytest.mark.parametrize("times", [1, 8])
def test_a_line_that_breaks_is_tried_again(
    server: str, copies: Copies, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    content = noise(6 << 20)
    bucket.put("slides", {"a.svs": content})
    before = planned("s3://slides/a.svs")
    with bucket.breaking_line(server, times, after=1 << 19) as (line, broke):
        bucket.use(monkeypatch, line)
        with copies.staged(record("s3://slides/a.svs"), before) as here:
            assert here.file.read_bytes() == content
        fsspec.filesystem("s3").clear_instance_cache()
    assert len(broke) == times


def test_a_server_that_is_gone_fails_the_slide(
    server: str, copies: Copies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("slides", {"a.svs": noise(5000)})
    before = planned("s3://slides/a.svs")
    monkeypatch.setattr(staging, "ATTEMPTS", 2)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    bucket.use(monkeypatch, "127.0.0.1:9")  # the port of discard, on which nobody listens
    gone = pytest.raises(SlideError, match=r"s3://slides/a.svs: cannot be fetched: .*\(2 attempts\)")
    with gone, copies.staged(record("s3://slides/a.svs"), before):
        pass
    assert files_in(tmp_path / "scratch") == set()


def test_no_room_blames_the_scratch_folder(
    server: str, copies: Copies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put("slides", {"a.svs": noise(5000)})
    monkeypatch.setattr(staging, "SPARED_BYTES", shutil.disk_usage(tmp_path).total - (1 << 20))
    with pytest.raises(ScratchFull) as full, copies.staged(record("s3://slides/a.svs"), planned("s3://slides/a.svs")):
        pass
    assert str(full.value.filename).startswith(str(tmp_path / "scratch"))


def test_a_scratch_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"--scratch {tmp_path / 'file'}: cannot be written"):
        Copies.of_run(tmp_path, str(tmp_path / "file")).open()


def test_errors_name_the_url_and_not_the_copy(server: str, copies: Copies) -> None:
    bucket.put("slides", {"a.svs": noise(5000)})
    there = record("s3://slides/a.svs")
    unreadable = pytest.raises(SlideError, match="^s3://slides/a.svs: cannot be read")
    with unreadable as error, copies.staged(there, planned("s3://slides/a.svs")) as here, open_slide(here):
        pass
    assert "scratch" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://slides/a b/c.svs", "s3://slides/a b/c.svs"),
        ("https://me:word@host/a.svs?X-Amz-Signature=abc", "https://host/a.svs"),
        ("https://token@host/a.svs#part", "https://host/a.svs"),
        ("s3://me:word@slides/a b #1/c.svs?token=abc", "s3://slides/a b #1/c.svs"),
        (
            "abfs://container@account.dfs.core.windows.net/a.svs?sig=abc",
            "abfs://container@account.dfs.core.windows.net/a.svs",
        ),
        ("wasbs://container:key@account/a.svs#sig=abc", "wasbs://container@account/a.svs"),
    ],
)
def test_a_url_is_shown_without_secrets(text: str, shown: str) -> None:
    assert str(Url(text)) == repr(Url(text)) == shown
    assert Url(text).without_secrets(f"GET '{text}' failed") == f"GET '{shown}' failed"

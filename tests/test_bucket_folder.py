"""Uploads to S3 on loopback: complete, in order, resumed, compared; and to a folder that fsspec reaches otherwise."""

from __future__ import annotations

from pathlib import Path

import bucket
import numpy as np
import pytest
from bucket import Unreliable

from hover_batch.bucket import ATTEMPTS, BucketFolder, upload_tree
from hover_batch.cohort.record import Url
from hover_batch.errors import InputError, UploadError
from hover_batch.files import sha256_file


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Three files by name; done.json is the one that is uploaded last."""
    contents = {"done.json": b"{}", "a/table": np.random.default_rng(0).bytes(300_000), "a/b/empty": b""}
    for name, content in contents.items():
        path = tmp_path / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {name: tmp_path / "local" / name for name in contents}


def read(files: dict[str, Path], folder: str = "run") -> dict[str, bytes]:
    return {f"{folder}/{name}": path.read_bytes() for name, path in files.items()}


def test_all_files_are_there_and_are_not_sent_again(
    server: str, files: dict[str, Path], unreliable: Unreliable
) -> None:
    folder = BucketFolder(Url("s3://bucket/run/"))
    upload_tree(files, folder, "done.json")
    assert bucket.contents("bucket") == read(files)
    assert unreliable.sent[-1] == "bucket/run/done.json" and len(unreliable.sent) == 3
    upload_tree(files, folder, "done.json")
    upload_tree(files, folder)
    assert len(unreliable.sent) == 3


def test_another_last_file_is_removed_before_the_others_are_replaced(
    server: str, files: dict[str, Path], unreliable: Unreliable
) -> None:
    folder = BucketFolder(Url("s3://bucket/run"))
    upload_tree(files, folder, "done.json")
    files["a/table"].write_bytes(b"other")
    files["done.json"].write_bytes(b"[1]")
    unreliable.failing = range(unreliable.calls + 5, 1000)  # three folders are listed, and one file is removed
    with pytest.raises(UploadError):
        upload_tree(files, folder, "done.json")
    assert set(bucket.contents("bucket")) == {"run/a/table", "run/a/b/empty"}
    unreliable.failing = ()
    upload_tree(files, folder, "done.json")
    assert bucket.contents("bucket") == read(files)
    assert unreliable.sent[3:] == ["bucket/run/a/table", "bucket/run/done.json"]


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.faults), 5])
def test_any_call_may_fail(server: str, files: dict[str, Path], unreliable: Unreliable, step: int) -> None:
    """Once: it is repeated. For good: the last file is there only if the others are, and the next adds the rest."""
    folder = BucketFolder(Url("s3://bucket/whole"))
    before = unreliable.calls
    upload_tree(files, folder, "done.json")
    whole = unreliable.calls - before
    assert whole > 5
    for number in range(1, whole + 1, step):
        for times in (1, 1000):
            url = f"s3://bucket/{number}-{times}"
            folder = BucketFolder(Url(url))
            first = unreliable.calls + number
            unreliable.failing = range(first, first + times)
            if times == 1:
                upload_tree(files, folder, "done.json")
            else:
                with pytest.raises(
                    UploadError, match=rf"{url}: cannot be (?:read|written): .*lost \({ATTEMPTS} att"
                ) as error:
                    upload_tree(files, folder, "done.json")
                assert bucket.SECRET not in str(error.value)
                unreliable.failing = ()
                there = folder.read(files)
                assert "done.json" not in there or len(there) == 3
                upload_tree(files, folder, "done.json")
            unreliable.failing = ()
            assert folder.read(files) == {name: path.read_bytes() for name, path in files.items()}


def test_content_is_compared_also_where_the_storage_reports_no_md5(server: str, files: dict[str, Path]) -> None:
    """As S3 does of files that are encrypted or large."""
    folder = BucketFolder(Url("s3://bucket/run"))
    upload_tree(files, folder)
    path = files["a/table"]
    entry = folder.entries(["a/table"])["a/table"]
    assert folder.holds(entry, path) and folder.holds(entry | {"ETag": '"0-2"'}, path)
    changed = bytearray(path.read_bytes())
    changed[200_000] ^= 1
    path.write_bytes(changed)
    assert not folder.holds(entry, path) and folder.holds(entry, path, by_size=True)
    upload_tree(files, folder)
    assert bucket.contents("bucket") == read(files)


def test_a_local_file_with_another_hash_is_not_uploaded(server: str, files: dict[str, Path]) -> None:
    folder = BucketFolder(Url("s3://bucket/run"))
    hashes = {"a/table": sha256_file(files["a/table"])}
    files["a/table"].write_bytes(b"corrupted")
    with pytest.raises(InputError, match=f"{files['a/table']}: checksum mismatch"):
        upload_tree(files, folder, "done.json", hashes)
    assert bucket.contents("bucket") == {}


def test_what_cannot_be_written_is_said_before_the_run(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BucketFolder(Url("s3://bucket/run")).check_writable()
    assert bucket.contents("bucket") == {}
    with pytest.raises(InputError, match="s3://none/run: no such bucket"):
        BucketFolder(Url("s3://none/run")).check_writable()
    with pytest.raises(InputError, match="s3://: names no bucket"):
        BucketFolder(Url("s3://"))
    with pytest.raises(InputError, match="http://127.0.0.1:9/run: cannot be written"):
        BucketFolder(Url("http://127.0.0.1:9/run")).check_writable()
    bucket.deny(server)
    try:
        with pytest.raises(InputError, match="access denied.*AWS_ACCESS_KEY_ID") as denied:
            BucketFolder(Url("s3://bucket/run")).check_writable()
        assert bucket.SECRET not in str(denied.value)
    finally:
        bucket.let_in(server)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the library waits for seconds between its own attempts
    bucket.use(monkeypatch, "127.0.0.1:9")
    with pytest.raises(InputError, match="s3://bucket/run: cannot be written"):
        BucketFolder(Url("s3://bucket/run")).check_writable()


def test_storage_with_folders(files: dict[str, Path], tmp_path: Path) -> None:
    """They are created, but not the one that stands for the bucket."""
    folder = BucketFolder(Url(f"file://{tmp_path}/run"))
    folder.check_writable()
    upload_tree(files, folder, "done.json")
    assert folder.names() == sorted(files)
    assert folder.read(files) == {name: path.read_bytes() for name, path in files.items()}
    folder.remove(["a/table"])
    assert folder.names() == ["a/b/empty", "done.json"]
    with pytest.raises(InputError, match="no such bucket or folder"):
        BucketFolder(Url(f"file://{tmp_path}/none/run")).check_writable()

"""Tests of the cache: files are complete, unchanged since their first use, and found by name."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import randomise
from typer.testing import CliRunner, Result

from hover_batch.cli import app
from hover_batch.compare.sides import load_side
from hover_batch.config import InferSettings
from hover_batch.errors import PackageError
from hover_batch.model.architectures.hovernet import TeacherArch, build_teacher
from hover_batch.model.cache import cached_package, download_path
from hover_batch.model.fetch import fetched
from hover_batch.model.package import STARTER, find_package
from hover_batch.model.published import HUB, KINDS

NAME = "hovernet_fast-pannuke"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["models", *map(str, arguments)])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOVER_BATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """tiatoolbox's .pth, with few channels."""
    path = tmp_path_factory.mktemp("published") / "x.pth"
    torch.save(randomise(build_teacher(TeacherArch("fast", 6, width=8))).state_dict(), path)
    return path.read_bytes()


class Server:
    """On 127.0.0.1: `files` by path, as a Hugging Face repository serves them; `asked` is what was requested."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.kind = "application/octet-stream"
        self.cut = 0
        """Bytes that are promised and not sent."""
        self.asked: list[str] = []
        ours = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                ours.asked.append(f"{self.command} {self.path}")
                if self.path in ours.redirects:
                    self.send_response(302)
                    self.send_header("Location", ours.redirects[self.path])
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content = ours.files.get(self.path)
                self.send_response(404 if content is None else 200)
                content = content or b""
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Content-Type", ours.kind)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "0" * 40)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content[: len(content) - ours.cut])

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()
    thread = threading.Thread(target=served.http.serve_forever)
    thread.start()
    yield served
    served.http.shutdown()
    thread.join()
    served.http.server_close()


def whole_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_a_url_becomes_a_package_found_by_its_name(server: Server, checkpoint: bytes, cache: Path) -> None:
    url = f"{server.url}/weights/nine%20lives.v2.pth?download=true"
    server.files["/weights/nine%20lives.v2.pth?download=true"] = checkpoint
    result = run("import", url, "--sha256", hashlib.sha256(checkpoint).hexdigest())
    assert result.exit_code == 0, result.output
    name = "nine_lives.v2"
    assert f"--model {name}" in result.stdout
    package = find_package(name)
    assert package.path == cache / "models" / f"{name}.safetensors" == cached_package(name)
    assert package.card.name == name and package.card.architecture == "hovernet-fast"
    assert f"\n{name}: hovernet-fast" in run("list", cache).stdout
    assert load_side(name, "--teacher", InferSettings()).card == package.card
    # Fetched once: the same again comes from the cache.
    before = package.sha256
    assert run("import", url).exit_code == 0
    assert len(server.asked) == 1 and find_package(name).sha256 == before


def test_a_package_is_downloaded_unchanged(server: Server, tmp_path: Path) -> None:
    server.files["/tiny.safetensors"] = STARTER.read_bytes()
    assert run("import", f"{server.url}/tiny.safetensors").exit_code == 0
    assert find_package("tiny").sha256 == find_package("starter").sha256
    server.files["/a/b/small.safetensors?download=true"] = STARTER.read_bytes()
    assert run("import", f"{server.url}/a/b/small.safetensors?download=true").exit_code == 0
    assert find_package("small").sha256 == find_package("starter").sha256
    server.files["/other/tiny.safetensors"] = STARTER.read_bytes()[:-1]
    result = run("import", f"{server.url}/other/tiny.safetensors")
    assert result.exit_code == 2 and "not a safetensors file" in result.stderr
    result = run("import", f"{server.url}/tiny.safetensors", "--kind", NAME)
    assert result.exit_code == 2 and "--kind" in result.stderr


def test_a_published_name_is_downloaded_by_tiatoolbox(
    server: Server, checkpoint: bytes, hovernet: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tiatoolbox's own code and Hugging Face's client, against a server of this test."""
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.file_download
    from tiatoolbox.models.architecture import PRETRAINED_INFO

    assert all(HUB.endswith("/" + PRETRAINED_INFO[name]["hf_repo_id"]) for name, k in KINDS.items() if k.by_name)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    repository = HUB.removeprefix("https://huggingface.co")
    server.files[f"{repository}/resolve/main/{NAME}.pth"] = checkpoint
    result = run("import", NAME)
    huggingface_hub.close_session()
    assert result.exit_code == 0, result.output
    assert server.asked[0].startswith("HEAD") and server.asked[-1].startswith("GET")
    assert find_package(NAME).card.training["recognised"] == "by the name given"
    assert (cache / "downloads" / f"{NAME}.pth").read_bytes() == checkpoint
    # compare takes the package, and asks nobody.
    asked = len(server.asked)
    assert load_side(NAME, "--teacher", InferSettings()).card.name == NAME and len(server.asked) == asked


def test_a_file_that_changed_since_its_first_use_is_refused(server: Server, checkpoint: bytes) -> None:
    server.files["/a.pth"] = checkpoint
    url = f"{server.url}/a.pth"
    path = fetched(url)
    record = path.with_name("a.pth.sha256")
    assert record.read_text() == f"{hashlib.sha256(checkpoint).hexdigest()}  a.pth\n"
    path.write_bytes(checkpoint + b"x")
    with pytest.raises(PackageError, match="at its first use"):
        fetched(url)
    path.unlink()
    server.files["/a.pth"] = checkpoint + b"y"
    with pytest.raises(PackageError, match="--sha256") as raised:
        fetched(url)
    assert not path.exists()  # what is not trusted does not stay
    trusted = str(raised.value).rpartition("--sha256 ")[2]
    assert fetched(url, trusted) == path and fetched(url) == path
    with pytest.raises(PackageError, match="not 0000"):
        fetched(url, "0" * 64)


def test_an_incomplete_file_never_has_the_name(server: Server, checkpoint: bytes, cache: Path) -> None:
    server.files["/a.pth"] = checkpoint
    server.cut = 100
    result = run("import", f"{server.url}/a.pth")
    path = download_path(f"{server.url}/a.pth")
    assert result.exit_code == 2 and f"copy it to {path}" in result.stderr and "Traceback" not in result.output
    assert whole_files(cache) == []


@pytest.mark.parametrize("source", ["https://models.invalid/a/net.pth", NAME])
def test_without_a_network_one_message_says_what_to_copy_where(
    source: str, cache: Path, checkpoint: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("import", source)
    path = download_path(source)
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
    url = source if "://" in source else f"{HUB}/resolve/main/{NAME}.pth"
    assert url in result.stderr and f"copy it to {path}" in result.stderr
    path.write_bytes(checkpoint)
    assert run("import", source).exit_code == 0
    assert find_package(path.stem).card.architecture == "hovernet-fast"


def test_only_https_is_trusted(server: Server) -> None:
    for url in ("http://models.invalid/a.pth", "ftp://models.invalid/a.pth", "file:///etc/passwd"):
        result = run("import", url)
        assert result.exit_code == 2 and "https" in result.stderr
    server.redirects["/a.pth"] = "http://localhost.invalid/a.pth"
    assert run("import", f"{server.url}/a.pth").exit_code == 2
    result = run("import", f"{server.url}/none.pth")
    assert result.exit_code == 2 and "Not Found" in result.stderr


def test_redirects_through_an_untrusted_server_are_refused(
    server: Server, checkpoint: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/b.pth"] = checkpoint
    port = server.http.server_port
    server.redirects = {"/a.pth": f"http://127.0.0.2:{port}/hop", "/hop": f"{server.url}/b.pth"}
    result = run("import", f"{server.url}/a.pth")
    assert result.exit_code == 2 and "https" in result.stderr
    assert server.asked == ["GET /a.pth"]


def test_a_web_page_is_refused_and_not_kept(server: Server, checkpoint: bytes, cache: Path) -> None:
    server.files["/net.pth"], server.kind = b"<html>log in</html>", "text/html; charset=utf-8"
    result = run("import", f"{server.url}/net.pth")
    assert result.exit_code == 2 and "the server sent a web page instead" in result.stderr
    assert whole_files(cache) == []
    server.files["/net.pth"], server.kind = checkpoint, "application/octet-stream"
    assert run("import", f"{server.url}/net.pth").exit_code == 0


def test_invalid_urls_and_targets_are_refused(server: Server, tmp_path: Path) -> None:
    result = run("import", "https://[models/net.pth")
    assert result.exit_code == 2 and "is not a valid URL" in result.stderr
    (tmp_path / "d.safetensors").mkdir()
    result = run("import", STARTER, "-o", tmp_path / "d.safetensors")
    assert result.exit_code == 2 and "d.safetensors: is a folder; give the path of a file" in result.stderr
    assert run("show", "x" * 5000).exit_code == 2


def test_a_name_in_use_is_not_overwritten(server: Server, checkpoint: bytes, tmp_path: Path) -> None:
    server.files["/a/net.pth"] = checkpoint
    assert run("import", f"{server.url}/a/net.pth").exit_code == 0
    (tmp_path / "net.pth").write_bytes(checkpoint + b"x")
    result = run("import", tmp_path / "net.pth")
    assert result.exit_code == 2 and "another source" in result.stderr
    assert run("import", tmp_path / "net.pth", "-o", tmp_path / "mine.safetensors").exit_code == 0
    (tmp_path / "starter.pth").write_bytes(checkpoint)
    result = run("import", tmp_path / "starter.pth")
    assert result.exit_code == 2 and "cannot be the name" in result.stderr


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 255
    path.write_bytes(content)


def test_verify_finds_corrupted_files(server: Server, checkpoint: bytes) -> None:
    server.files["/net.pth"] = checkpoint
    assert run("import", f"{server.url}/net.pth").exit_code == 0
    download = download_path(f"{server.url}/net.pth")
    result = run("verify")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "ok         starter",
        "ok         starter-open",
        "ok         net",
        f"ok         {download}",
    ]
    _flip(download)
    result = run("verify")
    assert result.exit_code == 2 and f"CORRUPTED  {download}" in result.stdout and "ok         net" in result.stdout
    assert run("verify", "starter", "net").exit_code == 0
    _flip(cached_package("net"))
    result = run("verify", "net")
    assert result.exit_code == 2 and "do not match their card" in result.stdout
    assert run("verify", "none").exit_code == 2
    download.with_name(f"{download.name}.sha256").write_bytes(b"\xff\n")
    assert run("verify").exit_code == 2
    download.unlink()
    result = run("verify")
    assert result.exit_code == 2 and f"CORRUPTED  {download}: {download}: cannot be read" in result.stdout


@pytest.mark.parametrize(("flag", "timing"), [("--teacher-weights", True), ("--against", False), ("--student", False)])
def test_the_remedy_names_the_option_that_was_given(monkeypatch: pytest.MonkeyPatch, flag: str, timing: bool) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PackageError, match=f"{flag}: the weights .* give the file: {flag} FILE.tar") as caught:
        load_side(NAME, flag, InferSettings())
    assert ("--timing-only" in str(caught.value)) == timing


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.symlink_to("/proc/self/mem")  # reading fails, also for root
    with pytest.raises(PackageError, match=r"x\.tar: cannot be read \(Input/output error\)"):
        load_side(str(path), "--against", InferSettings())
    with pytest.raises(PackageError, match=r"--against x+: cannot be read \(File name too long\)"):
        load_side("x" * 300, "--against", InferSettings())


@pytest.mark.parametrize("find", [find_package, lambda name: load_side(name, "--teacher", InferSettings())])
def test_no_name_leads_out_of_the_cache(find: Callable[[str], object], cache: Path) -> None:
    cache.mkdir()
    (cache / "secret.safetensors").write_bytes(STARTER.read_bytes())
    with pytest.raises(PackageError, match="no such package"):
        find("../secret")

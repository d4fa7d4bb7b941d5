"""Responses of `view`: the slide's own pixels, its nuclei, and nothing without the token."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from made_run import write_field, write_run
from numpy.typing import NDArray
from viewed import viewing

from hover_batch.errors import SlideError
from hover_batch.view import backdrop
from hover_batch.view.server import PAGE, Server

SECRET = "only in this file"


@dataclass(frozen=True)
class Answer:
    status: int
    content: bytes
    headers: Message


@dataclass(frozen=True)
class Viewed:
    run: Path
    image: NDArray[np.uint8]
    server: Server

    def ask(self, path: str, host: str | None = None, method: str = "GET") -> Answer:
        """`path` with TOKEN for the token; `host`: what the request names as its host."""
        port = self.server.server_address[1]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.putrequest(method, path.replace("TOKEN", self.server.token), skip_host=True)
        connection.putheader("Host", host if host is not None else f"127.0.0.1:{port}")
        connection.endheaders()
        response = connection.getresponse()
        answer = Answer(response.status, response.read(), response.headers)
        connection.close()
        return answer

    def tile(self, level: int, column: int, row: int) -> NDArray[np.uint8]:
        answer = self.ask(f"/TOKEN/slide/{level}/{column}/{row}")
        assert answer.status == 200 and answer.headers["Content-Type"] == "image/jpeg"
        return decoded(answer.content)


def decoded(content: bytes) -> NDArray[np.uint8]:
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return np.asarray(image, np.uint8)


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewed]:
    folder = tmp_path_factory.mktemp("run")
    (folder / "secret.txt").write_text(SECRET)
    field = write_field(folder, 1300)
    layout = write_run(folder / "out", *field, done=["a"])
    image = cv2.imread(str(field[0]))
    assert image is not None
    with viewing(layout.root) as (server, told):
        assert "thumbnail" not in "".join(told)
        yield Viewed(layout.root, np.asarray(image, np.uint8), server)


def test_it_listens_to_this_machine_alone(viewed: Viewed) -> None:
    assert viewed.server.socket.getsockname()[0] == "127.0.0.1"
    assert viewed.server.url == f"http://127.0.0.1:{viewed.server.server_address[1]}/{viewed.server.token}/"
    assert len(viewed.server.token) >= 32


@pytest.mark.parametrize("path", ["/", "/TOKEN", "/TOKENx/", "/x/info.json", "//info.json", "/%54OKEN/", "*"])
def test_without_the_token_nothing_is_there(viewed: Viewed, path: str) -> None:
    answer = viewed.ask(path)
    assert answer.status == 404
    assert b"nuclei" not in answer.content and viewed.server.token.encode() not in answer.content


def test_bytes_that_are_no_text_do_no_harm(viewed: Viewed) -> None:
    port = viewed.server.server_address[1]
    with socket.create_connection(("127.0.0.1", port), timeout=60) as raw:
        raw.sendall(b"GET /\xff\xf6/info.json HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nConnection: close\r\n\r\n" % port)
        assert raw.makefile("rb").readline() == b"HTTP/1.1 404 Not Found\r\n"


@pytest.mark.parametrize(
    "host", ["attacker.example", "attacker.example:PORT", "127.0.0.1", "127.0.0.1:1", "", "[::1]:PORT"]
)
def test_another_host_is_refused_though_the_token_is_right(viewed: Viewed, host: str) -> None:
    port = str(viewed.server.server_address[1])
    for path in ("/TOKEN/", "/TOKEN/info.json", "/TOKEN/slide/0/0/0"):
        answer = viewed.ask(path, host.replace("PORT", port))
        assert answer.status == 403 and answer.content[:0] != b"a"
        assert b"slide_id" not in answer.content and b"<html" not in answer.content


def test_a_tunnel_to_localhost_is_let_in(viewed: Viewed) -> None:
    port = viewed.server.server_address[1]
    assert viewed.ask("/TOKEN/", f"localhost:{port}").status == 200
    other = viewed.ask("/TOKEN/", "localhost:1")  # the tunnel has another port on this side
    assert other.status == 403 and f"ssh -L {port}:localhost:{port} SERVER".encode() in other.content


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt",
        "../../secret.txt",
        "..%2f..%2fsecret.txt",
        "%2e%2e/secret.txt",
        "page/../../../secret.txt",
        "//etc/passwd",
        "server.py",
        "../server.py",
        "slide/0/0/0/../../../secret.txt",
        "slide/0/0",
        "slide/-1/0/0",
        "slide/0/0/0x",
        "slide/9/0/0",
        "slide/0/1/0",
        "nuclei/9/9",
        "nuclei/0/0/0",
        "density/0/99/0",
        "nucleus/0",
        "nucleus/99999",
        "nucleus/1234567890123456789012345678901234567890",
        "nucleus/٣",
        "info.json?x",
        "info.json/",
    ],
)
def test_only_what_is_listed_is_there(viewed: Viewed, path: str) -> None:
    answer = viewed.ask("/TOKEN/" + path.encode().decode("latin-1").replace("Ù£", "%D9%A3"))
    assert answer.status == 404
    assert SECRET.encode() not in answer.content


def test_it_only_answers(viewed: Viewed) -> None:
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert viewed.ask("/TOKEN/info.json", method=method).status == 501


def test_every_answer_forbids_what_the_page_does_not_need(viewed: Viewed) -> None:
    for path in ("/", "/TOKEN/", "/TOKEN/info.json", "/TOKEN/nuclei/0/0", *(f"/TOKEN/{name}" for name in PAGE)):
        headers = viewed.ask(path).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in headers
        assert "Python" not in headers["Server"]


def test_a_slide_that_cannot_be_read_any_more_is_said_to_be(viewed: Viewed, monkeypatch: pytest.MonkeyPatch) -> None:
    def harmed(*_: object) -> None:
        raise SlideError("slide.svs: cannot be read")

    monkeypatch.setattr(backdrop.Backdrop, "tile", harmed)
    answer = viewed.ask("/TOKEN/slide/0/0/0")
    assert (answer.status, answer.content) == (500, b"slide.svs: cannot be read\n")


def test_the_page_says_what_is_to_be_seen(viewed: Viewed) -> None:
    assert viewed.ask("/TOKEN/").headers["Content-Type"] == "text/html; charset=utf-8"
    info = json.loads(viewed.ask("/TOKEN/info.json").content)
    rows = pq.read_table(viewed.run / "slides" / "a" / "nuclei.parquet").to_pandas()
    assert (info["slide_id"], info["width"], info["height"], info["missing"]) == ("a", 1300, 1300, None)
    assert info["nuclei"]["count"] == len(rows) > 100
    counts = rows["type"].value_counts()
    assert {kind["name"]: kind["count"] for kind in info["classes"][1:]} == {
        name: int(counts.get(name, 0)) for name in ("miscellaneous", "inflammatory", "epithelial", "spindle")
    }
    row = json.loads(viewed.ask("/TOKEN/nucleus/7").content)
    assert (row["nucleus_id"], row["type"]) == (7, rows["type"][6])


def test_tiles_are_the_slides_own_pixels(viewed: Viewed) -> None:
    """At the finest level; and a level above, each the mean of four."""
    whole = np.vstack([np.hstack([viewed.tile(2, column, row) for column in range(3)]) for row in range(3)])
    assert whole.shape == viewed.image.shape
    here = np.abs(whole.astype(int) - viewed.image).mean()
    moved = np.abs(whole[:, 1:].astype(int) - viewed.image[:, :-1]).mean()
    assert here < 4 and here < moved / 2, "but for what JPEG loses"
    half = np.vstack([np.hstack([viewed.tile(1, column, row) for column in range(2)]) for row in range(2)])
    expected = cv2.resize(viewed.image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    here = np.abs(half.astype(int) - expected).mean()
    moved = np.abs(half[:, 1:].astype(int) - expected[:, :-1]).mean()
    assert here < 5 and here < moved / 2, "half a pixel to a side would show"
    assert viewed.tile(0, 0, 0).shape == (325, 325, 3)


def test_a_slide_that_is_gone_is_shown_on_its_thumbnail(tmp_path: Path) -> None:
    field = write_field(tmp_path, 1300)
    layout = write_run(tmp_path / "out", *field, done=["a"])
    image = cv2.imread(str(field[0]))
    assert image is not None
    thumbnail = cv2.resize(image, (260, 260), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(layout.slide("a").thumbnail_jpg), thumbnail)
    field[0].unlink()
    with viewing(layout.root) as (server, told):
        viewed = Viewed(layout.root, thumbnail, server)
        assert f"a: the slide cannot be opened, its thumbnail is shown instead: {field[0]} does not exist" in told
        info = json.loads(viewed.ask("/TOKEN/info.json").content)
        assert info["missing"] == f"{field[0]} does not exist"
        # The thumbnail's pixels are 5 wide: tiles of 4 lose nothing of it.
        assert info["slide"] == {"finest": 4, "max_level": 0, "tile": backdrop.TILE}
        tile = viewed.tile(0, 0, 0)
        assert tile.shape == (325, 325, 3)
        expected = cv2.resize(image, (325, 325), interpolation=cv2.INTER_AREA)
        here = np.abs(tile.astype(int) - expected).mean()
        moved = np.abs(tile[:, 1:].astype(int) - expected[:, :-1]).mean()
        assert here < moved, "nuclei lie where they are in the slide"


def test_a_pyramid_is_read_from_the_level_that_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slide as scanners write them, of the example's tissue: coarse tiles agree with fine ones."""
    from hover_batch.cohort.record import SlideRecord
    from hover_batch.slide.example import write_example
    from hover_batch.slide.reader import open_slide
    from hover_batch.slide.sources import OpenSlideSource

    write_example(tmp_path)
    path = next(tmp_path.glob("*0.25*.tif*"))
    with open_slide(SlideRecord(slide_id="a", path=path, row=2)) as reader:
        assert isinstance(getattr(reader, "source", None), OpenSlideSource)
        view = backdrop.Backdrop(reader)
        assert view.max_level == 1
        fine = np.vstack([np.hstack([decoded(view.tile(1, c, r) or b"") for c in range(2)]) for r in range(2)])
        coarse = decoded(view.tile(0, 0, 0) or b"")
        expected = cv2.resize(fine, (coarse.shape[1], coarse.shape[0]), interpolation=cv2.INTER_AREA)
        here = np.abs(coarse.astype(int) - expected).mean()
        moved = np.abs(coarse[1:].astype(int) - expected[:-1]).mean()
        assert here < 8 and here < moved / 2

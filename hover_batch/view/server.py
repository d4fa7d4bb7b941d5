"""HTTP server of the viewer, for this machine only.

It listens on loopback. Since any website can make a browser send requests to 127.0.0.1, and so can any other user of
the machine, paths begin with a random token, and requests for another host name, as after DNS rebinding, are refused.
Requests never contain file names: `Site` lists all valid paths.
"""

from __future__ import annotations

import json
import re
import secrets
import socketserver
import sys
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from typing import Any

from hover_batch.errors import HoverBatchError, InputError
from hover_batch.quality.flags import Flag
from hover_batch.view.backdrop import TILE, Backdrop
from hover_batch.view.nuclei import CELLS, NucleiTiles

ADDRESS = "127.0.0.1"
"""Address on which the server listens."""
PAGE = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "openseadragon.min.js": ("openseadragon.min.js", "text/javascript; charset=utf-8"),
    "LICENSE-openseadragon.txt": ("LICENSE-openseadragon.txt", "text/plain; charset=utf-8"),
}
"""Static files of the page: (file name, content type) by path."""
_OPENSEADRAGON_RULE = "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='"
"""Hash of the only style rule that OpenSeadragon adds to the page: no outline if the device has no mouse."""
HEADERS = {
    # The browser refuses all other scripts, everything from other hosts, and frames of other pages. Cache-Control keeps
    # the slide out of its cache on disk.
    "Content-Security-Policy": f"default-src 'none'; script-src 'self'; style-src 'self' {_OPENSEADRAGON_RULE}; "
    "img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
_PATH = re.compile(r"(slide|nuclei|density|nucleus)((?:/[0-9]{1,9})+)")

Answer = tuple[bytes, str]
"""(content, content type) of a response."""


class Site:
    """Resources that the server offers for one slide, by their path after the token.

    `backdrop`: tiles of the picture. `nuclei`: tiles of the nuclei. `flags`: quality flags of the slide.
    """

    def __init__(self, backdrop: Backdrop, nuclei: NucleiTiles, flags: Sequence[Flag]) -> None:
        self._kinds: dict[tuple[str, int], Callable[..., Answer | None]] = {
            ("slide", 3): lambda level, x, y: _typed(backdrop.tile(level, x, y), "image/jpeg"),
            ("nuclei", 2): lambda x, y: _typed(nuclei.contours(x, y), "application/octet-stream"),
            ("density", 3): lambda level, x, y: _typed(nuclei.density(level, x, y), "application/octet-stream"),
            ("nucleus", 1): lambda number: _json(nuclei.row(number)),
        }
        package_files = files("hover_batch.view") / "page"
        self._fixed = {path: ((package_files / name).read_bytes(), kind) for path, (name, kind) in PAGE.items()}
        self._fixed["info.json"] = _json(_info(backdrop, nuclei, flags)) or (b"", "")

    def answer(self, path: str) -> Answer | None:
        """Return the content and the content type of a resource; None if it does not exist.

        `path`: path in the URL after the token and its slash. It is slide/LEVEL/COLUMN/ROW (JPEG), nuclei/COLUMN/ROW,
        density/LEVEL/COLUMN/ROW, nucleus/NUCLEUS_ID (JSON), info.json, or a key of PAGE.

        SlideError if the slide or its table can no longer be read.
        """
        if match := _PATH.fullmatch(path):
            numbers = [int(number) for number in match[2][1:].split("/")]
            answer_of = self._kinds.get((match[1], len(numbers)))
            return answer_of(*numbers) if answer_of else None
        return self._fixed.get(path)


def _info(backdrop: Backdrop, nuclei: NucleiTiles, flags: Sequence[Flag]) -> dict[str, Any]:
    """Return what the page needs before it draws: sizes in level-0 pixels, classes with their colours and counts."""
    table = nuclei.table
    return {
        "slide_id": table.slide_id,
        "width": table.level0.width,
        "height": table.level0.height,
        "mpp": [table.mpp.x, table.mpp.y],
        "missing": backdrop.missing,
        "flags": [{"name": flag.name, "sentence": flag.sentence} for flag in flags],
        "slide": {"finest": backdrop.finest, "max_level": backdrop.max_level, "tile": TILE},
        "nuclei": {"tile": nuclei.tile, "step": nuclei.step, "cells": CELLS, "count": table.rows},
        "classes": [
            {
                "name": c.name,
                "color": list(c.color),
                "count": int(nuclei.counts[c.id]),
                "peak": float(nuclei.peaks[c.id]),
            }
            for c in table.taxonomy.classes
        ],
    }


def _typed(content: bytes | None, kind: str) -> Answer | None:
    """Return the content with its type; None if there is no content."""
    return None if content is None else (content, kind)


def _json(value: dict[str, Any] | None) -> Answer | None:
    """Return the value as JSON; None if there is no value."""
    return None if value is None else (json.dumps(value).encode(), "application/json")


class Server(socketserver.ThreadingTCPServer):
    """Server that listens on loopback as soon as it is made, and answers once `site` is set and `serve_forever` runs.

    Each request is answered in a thread of its own. `port`: 0 for any free port. InputError if the server cannot listen
    on it, for example because it is taken.
    """

    site: Site
    """Resources that are served; set it before `serve_forever`."""
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int) -> None:
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise InputError(
                f"--port {port}: {error.strerror}; give another port, or leave it out to use any free one"
            ) from error
        self.hosts = {f"{name}:{self.server_address[1]}" for name in (ADDRESS, "localhost")}

    @property
    def url(self) -> str:
        """URL of the page on this machine. It contains the secret token."""
        return f"http://{ADDRESS}:{self.server_address[1]}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error of a request to stderr. Print nothing if the browser closed the connection.

        Browsers close connections when they no longer need a tile. `socketserver.BaseServer.handle_error`, which this
        method overrides, describes the arguments.
        """
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers one browser connection. Only GET is supported."""

    protocol_version = "HTTP/1.1"  # keeps connections open
    timeout = 60
    server: Server
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Send a resource of the site, after checking the host name and the token."""
        if self.headers.get("Host") not in self.server.hosts:
            self._send(HTTPStatus.FORBIDDEN, *_text(self._wrong_host()))
            return
        _, token, *rest = self.path.split("/", 2) if self.path.startswith("/") else ("", "")
        if not rest or not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._send(
                HTTPStatus.NOT_FOUND, *_text("Not found. Open the whole address that hover-batch view printed.\n")
            )
            return
        try:
            answer = self.server.site.answer(rest[0])
        except HoverBatchError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, *_text(f"{error}\n"))
            return
        self._send(HTTPStatus.OK if answer else HTTPStatus.NOT_FOUND, *(answer or _text("Not found.\n")))

    def _wrong_host(self) -> str:
        port = self.server.server_address[1]
        return (
            f"Wrong host or port. Open the address at {ADDRESS} that was printed. Through an SSH tunnel, use the same "
            f"port on both sides: ssh -L {port}:localhost:{port} SERVER, or choose another one with --port.\n"
        )

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        """Name of the server, without versions."""
        return "hover-batch"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, since the lines would contain the token."""


def _text(text: str) -> Answer:
    """Return plain text as an answer."""
    return text.encode(), "text/plain; charset=utf-8"

"""What the page asks for, over HTTP, of this machine alone.

Nothing but loopback is listened on. Still any website can make a browser ask 127.0.0.1 for things, and so can any
other user of the machine: so the path begins with a random token, and a request that does not name this address as its
host, as after DNS rebinding, is refused. No request names a file: what can be asked for is listed in `Site`.
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
PAGE = {
    "": ("index.html", "text/html; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "openseadragon.min.js": ("openseadragon.min.js", "text/javascript; charset=utf-8"),
    "LICENSE-openseadragon.txt": ("LICENSE-openseadragon.txt", "text/plain; charset=utf-8"),
}
"""The page's own files by their paths, and their types."""
_OPENSEADRAGON_RULE = "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='"
"""The one rule of style that OpenSeadragon puts into the page: no outline where there is no mouse."""
HEADERS = {
    # The browser itself refuses whatever else there might be: scripts but ours, anything from elsewhere, other pages'
    # frames. And nothing of a slide stays in its cache on disk.
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
"""Content and its type."""


class Site:
    """Path, behind the token → what is there."""

    def __init__(self, backdrop: Backdrop, nuclei: NucleiTiles, flags: Sequence[Flag]) -> None:
        self._kinds: dict[tuple[str, int], Callable[..., Answer | None]] = {
            ("slide", 3): lambda level, x, y: _typed(backdrop.tile(level, x, y), "image/jpeg"),
            ("nuclei", 2): lambda x, y: _typed(nuclei.contours(x, y), "application/octet-stream"),
            ("density", 3): lambda level, x, y: _typed(nuclei.density(level, x, y), "application/octet-stream"),
            ("nucleus", 1): lambda number: _json(nuclei.row(number)),
        }
        ours = files("hover_batch.view") / "page"
        self._fixed = {path: ((ours / name).read_bytes(), kind) for path, (name, kind) in PAGE.items()}
        self._fixed["info.json"] = _json(_info(backdrop, nuclei, flags)) or (b"", "")

    def answer(self, path: str) -> Answer | None:
        """None where there is nothing. SlideError where the slide or its table cannot be read any more."""
        if match := _PATH.fullmatch(path):
            numbers = [int(number) for number in match[2][1:].split("/")]
            kind = self._kinds.get((match[1], len(numbers)))
            return kind(*numbers) if kind else None
        return self._fixed.get(path)


def _info(backdrop: Backdrop, nuclei: NucleiTiles, flags: Sequence[Flag]) -> dict[str, Any]:
    """What the page must know before it draws. Sizes are in level-0 pixels."""
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
    return None if content is None else (content, kind)


def _json(value: dict[str, Any] | None) -> Answer | None:
    return None if value is None else (json.dumps(value).encode(), "application/json")


class Server(socketserver.ThreadingTCPServer):
    """Listens from the start, and answers once it has a `site` and serves. `port` 0: any that is free. InputError where
    it is taken."""

    site: Site
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int) -> None:
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}; name another, or none for any that is free") from error
        self.hosts = {f"{name}:{self.server_address[1]}" for name in (ADDRESS, "localhost")}

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up on what it needs no more is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept
    timeout = 60
    server: Server
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            self._send(HTTPStatus.FORBIDDEN, *_text(f"Open {ADDRESS} at the port that hover-batch view printed.\n"))
            return
        _, token, *rest = self.path.split("/", 2) if self.path.startswith("/") else ("", "")
        if not rest or not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._send(HTTPStatus.NOT_FOUND, *_text("Nothing is here. Open the whole address that was printed.\n"))
            return
        try:
            answer = self.server.site.answer(rest[0])
        except HoverBatchError as error:
            self._send(HTTPStatus.INTERNAL_SERVER_ERROR, *_text(f"{error}\n"))
            return
        self._send(HTTPStatus.OK if answer else HTTPStatus.NOT_FOUND, *(answer or _text("Nothing is here.\n")))

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        return "hover-batch"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the lines would hold the token."""


def _text(text: str) -> Answer:
    return text.encode(), "text/plain; charset=utf-8"

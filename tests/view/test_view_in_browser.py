"""The viewer in a real browser: nuclei lie on those of the slide, show their rows, and can be hidden."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from browser import CHROMIUM, NO_CHROMIUM, Browser, chromium
from made_run import write_field, write_run
from numpy.typing import NDArray
from viewed import command, viewing

from hover_batch.errors import SlideError
from hover_batch.view.backdrop import Backdrop

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

SLIDE_ID = "0A..b_-c--D__e." + "x9._-" * 20 + "Z"
SIDE = 2600
"""Of the slide in pixels: in a window this small, nuclei are seen from afar."""
WIDTH, HEIGHT = 800, 450
NUCLEUS = 300
VIEWER = "OpenSeadragon.getViewer(document.getElementById('slide'))"


@dataclass(frozen=True)
class Viewed:
    browser: Browser
    url: str
    run: Path
    table: pd.DataFrame
    image: NDArray[np.uint8]

    def open(self, width: int = WIDTH, height: int = HEIGHT) -> None:
        self.browser.open(self.url, width, height)
        self.settle()

    def settle(self) -> None:
        """Until the slide stands still, and all tiles of it and of the nuclei are there."""
        self.browser.wait_for(
            f"""document.body.dataset.waiting === '0' && {VIEWER}.world.getItemAt(0)?.getFullyLoaded() &&
            {VIEWER}.viewport.getZoom(true) === {VIEWER}.viewport.getZoom() &&
            {VIEWER}.viewport.getCenter(true).equals({VIEWER}.viewport.getCenter())"""
        )
        self.browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def go_to(self, nucleus: int) -> None:
        self.browser.evaluate(
            f"document.getElementById('number').value = {nucleus}; document.querySelector('#find button').click()"
        )
        aim = self.table.iloc[nucleus - 1]
        self.browser.wait_for(
            f"{VIEWER}.viewport.getCenter().distanceTo(new OpenSeadragon.Point({aim.centroid_x / SIDE}, "
            f"{aim.centroid_y / SIDE})) < 1e-6"
        )
        self.settle()

    def on_screen(self, x: float, y: float) -> tuple[float, float]:
        """Of a level-0 position, by OpenSeadragon's own reckoning."""
        there = f"new OpenSeadragon.Point({x / SIDE}, {y / SIDE})"
        point = self.browser.evaluate(f"(p => [p.x, p.y])({VIEWER}.viewport.pixelFromPoint({there}, true))")
        return point[0], point[1]

    def point_at(self, x: float, y: float) -> None:
        self.browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def toggle(self, name: str) -> None:
        self.browser.evaluate(
            f"[...document.querySelectorAll('#classes li')].find(row => row.querySelector('.name').textContent === "
            f"{json.dumps(name)}).querySelector('input').click()"
        )
        self.browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def state(self) -> str:
        return str(self.browser.evaluate("document.getElementById('state').textContent"))

    def drawn(self) -> NDArray[np.uint8]:
        """The canvas of nuclei, RGBA (y, x, 4)."""
        png = str(self.browser.evaluate("document.querySelector('canvas.nuclei').toDataURL()"))
        bgra = cv2.imdecode(np.frombuffer(base64.b64decode(png.split(",")[1]), np.uint8), cv2.IMREAD_UNCHANGED)
        assert bgra is not None
        return np.asarray(bgra[..., [2, 1, 0, 3]], np.uint8)

    def row(self) -> dict[str, str]:
        """What is told of the nucleus that is pointed at; empty if none is."""
        shown: dict[str, str] = self.browser.evaluate(
            "document.getElementById('nucleus').hidden ? {} : Object.fromEntries("
            "[...document.querySelectorAll('#nucleus tr')].map(row => [...row.cells].map(cell => cell.textContent)))"
        )
        return shown


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Viewed]:
    folder = tmp_path_factory.mktemp("run")
    field = write_field(folder, SIDE)
    layout = write_run(folder / "out", *field, done=["other", SLIDE_ID])
    table = pq.read_table(layout.slide(SLIDE_ID).nuclei_parquet).to_pandas()
    image = cv2.imread(str(field[0]))
    assert image is not None
    with (
        viewing(layout.root, SLIDE_ID) as (server, _),
        chromium(tmp_path_factory.mktemp("profile")) as browser,
    ):
        yield Viewed(browser, server.url, layout.root, table, np.asarray(image, np.uint8))


@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (1366, 768), (WIDTH, HEIGHT)])
def test_it_stays_in_the_window_and_asks_nobody_else(viewed: Viewed, width: int, height: int) -> None:
    viewed.open(width, height)
    browser = viewed.browser
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.documentElement.scrollHeight") <= height
    aside = "document.querySelector('aside')"
    assert browser.evaluate(f"{aside}.scrollWidth <= {aside}.clientWidth"), "a long slide_id is broken"
    assert browser.evaluate("document.title") == f"{SLIDE_ID} – hover-batch"
    assert browser.evaluate("document.getElementById('note').hidden"), "nothing went wrong"
    asked = browser.requested()
    assert asked and [url for url in asked if not url.startswith(viewed.url)] == []
    assert browser.complaints() == []


def test_from_afar_density_is_drawn_and_near_by_contours(viewed: Viewed) -> None:
    viewed.open()
    assert viewed.state() == "Density of nuclei"
    x, y = viewed.on_screen(SIDE / 2, SIDE / 2)
    for delta, state in ((-120, "contours"), (-120, "contours"), (120, "contours"), (120, "density")):
        for _ in range(3):
            viewed.browser.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=delta)
            viewed.browser.evaluate("new Promise(done => setTimeout(done, 100))")
        viewed.settle()
        assert viewed.browser.evaluate("document.body.dataset.drawn") == state
        assert viewed.drawn()[..., 3].any()


def test_contours_lie_on_the_slides_nuclei(viewed: Viewed, tmp_path: Path) -> None:
    """Of a nucleus by itself, contour and picture have the same middle to half a pixel of the slide."""
    viewed.open(1366, 768)
    viewed.go_to(NUCLEUS)
    viewed.browser.evaluate("[1, 2].forEach(() => document.getElementById('in').click())")
    viewed.settle()
    nucleus = viewed.table.iloc[NUCLEUS - 1]
    # The field has one nucleus in every square of 25 pixels; not all of them are in the table.
    corner = np.array([nucleus.centroid_x, nucleus.centroid_y]) // 25 * 25
    (x0, y0), (x1, y1) = viewed.on_screen(*corner), viewed.on_screen(*(corner + 25))
    scale = (x1 - x0) / 25
    assert scale > 4
    square = slice(round(y0), round(y1)), slice(round(x0), round(x1))
    contour = viewed.drawn()[square][..., 3] > 128
    viewed.toggle("all")
    assert not viewed.drawn().any()
    viewed.browser.screenshot(tmp_path / "slide.png")
    shot = cv2.imread(str(tmp_path / "slide.png"))
    assert shot is not None
    dark = shot[square][..., 1] < 110

    def box(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
        rows, columns = np.nonzero(mask)
        return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / scale

    seen, outlined = box(dark), box(contour)
    assert (seen[2:] - seen[:2]).min() > 8
    np.testing.assert_allclose(outlined[:2] + outlined[2:], seen[:2] + seen[2:], rtol=0, atol=2 * 0.5)
    np.testing.assert_allclose(outlined, seen, rtol=0, atol=1.2)


def test_a_nucleus_that_is_pointed_at_tells_its_row(viewed: Viewed) -> None:
    viewed.open()
    viewed.go_to(NUCLEUS)
    viewed.browser.wait_for("document.querySelectorAll('#nucleus tr').length > 10")
    assert viewed.row()["nucleus_id"] == str(NUCLEUS), "one that was gone to is marked"
    nucleus = viewed.table.iloc[NUCLEUS - 1]
    x, y = viewed.on_screen(nucleus.centroid_x, nucleus.centroid_y)
    viewed.point_at(x, y)
    viewed.browser.wait_for("document.querySelectorAll('#nucleus tr').length > 10")
    row = viewed.row()
    assert (row["nucleus_id"], row["type"]) == (str(NUCLEUS), nucleus.type)
    for name in ("centroid_x", "type_prob", "area_um2", "seg_score", f"prob_{nucleus.type}"):
        assert float(row[name]) == pytest.approx(nucleus[name], rel=1e-3)
    box = nucleus.bbox
    viewed.point_at(*viewed.on_screen(box["xmin"] - 1, box["ymin"] - 1))
    viewed.browser.wait_for("document.getElementById('nucleus').hidden")
    viewed.point_at(x, y)
    viewed.browser.wait_for("!document.getElementById('nucleus').hidden")
    viewed.toggle(nucleus.type)
    assert viewed.row() == {}, "what is not drawn is not told of"


def test_classes_can_be_switched_off(viewed: Viewed) -> None:
    viewed.open(1366, 768)
    kinds = {"inflammatory": (0, 160, 60), "epithelial": (220, 30, 40), "spindle": (30, 90, 230)}
    counts = viewed.table["type"].value_counts()
    assert set(counts.index) == set(kinds)
    listed = viewed.browser.evaluate("[...document.querySelectorAll('#classes .count')].map(e => e.textContent)")
    assert [int(text.replace(",", "")) for text in listed] == [len(viewed.table), 0, *(counts[kind] for kind in kinds)]

    def colours() -> set[str]:
        pixels = viewed.drawn()
        opaque = pixels[pixels[..., 3] == 255][:, :3].astype(int)
        return {kind for kind, color in kinds.items() if (np.abs(opaque - color).max(axis=1) < 12).any()}

    assert viewed.browser.evaluate("document.body.dataset.drawn") == "contours"
    assert viewed.state() == f"{len(viewed.table):,} nuclei in view"
    assert colours() == set(kinds)
    viewed.toggle("epithelial")
    assert viewed.state() == f"{len(viewed.table) - counts['epithelial']:,} nuclei in view"
    assert colours() == set(kinds) - {"epithelial"}
    viewed.toggle("all")
    assert colours() == set(kinds)
    viewed.toggle("all")
    assert viewed.state() == "0 nuclei in view" and not viewed.drawn().any()
    viewed.toggle("spindle")
    assert colours() == {"spindle"}


def test_density_shows_the_classes_that_are_on(viewed: Viewed) -> None:
    viewed.open()
    assert viewed.drawn()[..., 3].any()
    viewed.toggle("all")
    assert not viewed.drawn().any()
    viewed.toggle("inflammatory")
    pixels = viewed.drawn()
    shown = pixels[pixels[..., 3] > 200][:, :3].astype(int)
    assert len(shown) and np.abs(shown - (0, 160, 60)).max() <= 2


def test_keys_do_not_turn_the_slide_under_its_nuclei(viewed: Viewed) -> None:
    viewed.open()
    viewed.browser.evaluate(f"{VIEWER}.canvas.focus()")
    for key in ("r", "f", "R", "+"):
        for kind in ("keyDown", "keyUp"):
            viewed.browser.call(
                "Input.dispatchKeyEvent", type=kind, key=key, text=key, windowsVirtualKeyCode=ord(key.upper())
            )
    viewed.settle()
    assert viewed.browser.evaluate(f"{VIEWER}.viewport.getRotation()") == 0
    assert not viewed.browser.evaluate(f"{VIEWER}.viewport.getFlip()")


def test_a_nucleus_that_is_not_there_is_said_to_be(viewed: Viewed) -> None:
    viewed.open()
    browser = viewed.browser
    browser.evaluate("document.getElementById('find').noValidate = true")
    browser.evaluate("document.getElementById('number').value = 0; document.querySelector('#find button').click()")
    browser.wait_for("!document.getElementById('note').hidden")
    told = browser.evaluate("document.getElementById('note').textContent")
    assert told == f"There is no nucleus 0; they are numbered 1 to {len(viewed.table)}."


def test_a_server_that_has_ended_is_said_to_have(viewed: Viewed) -> None:
    with command(viewed.run, "--slide", SLIDE_ID, "--no-browser") as (_, url):
        viewed.browser.open(url)
        viewed.browser.wait_for("document.body.dataset.waiting === '0'")
    viewed.browser.evaluate("document.getElementById('in').click()")
    viewed.browser.wait_for("document.getElementById('note').textContent.startsWith('hover-batch view has ended.')")


def test_what_cannot_be_read_is_said_to_be(viewed: Viewed, monkeypatch: pytest.MonkeyPatch) -> None:
    def harmed(*_: object) -> None:
        raise SlideError("<b>slide.svs</b>: cannot be read")

    monkeypatch.setattr(Backdrop, "tile", harmed)
    viewed.browser.open(viewed.url)
    viewed.browser.wait_for("!document.getElementById('note').hidden")
    told = viewed.browser.evaluate("document.getElementById('note').textContent")
    assert told.strip() == "The slide cannot be read: <b>slide.svs</b>: cannot be read"

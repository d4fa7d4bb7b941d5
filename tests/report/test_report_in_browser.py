"""The report in a real browser: it sorts and filters, fits the window, and sends no requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, NO_CHROMIUM, Browser, chromium
from made_run import write_field, write_run
from typer.testing import CliRunner

from hover_batch.cli import app

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

MARKUP = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"
COLUMN = "[...document.querySelectorAll('#rows tbody tr:not([hidden])')].map(row => row.cells[{}].textContent.trim())"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the report on three slides and a row whose slide_id is markup."""
    folder = tmp_path_factory.mktemp("run")
    layout = write_run(
        folder / "out", *write_field(folder), done=["slide-9", "slide-10", "b"], failed=[(MARKUP, MARKUP)], group=MARKUP
    )
    assert CliRunner().invoke(app, ["report", str(layout.root)]).exit_code == 0
    return layout.report_html.as_uri()


def click(browser: Browser, column: int) -> None:
    browser.evaluate(f"document.querySelector('#rows thead').rows[0].cells[{column}].click()")


@pytest.mark.parametrize("width", [1920, 1366, 800])
def test_it_stays_in_the_window_and_asks_for_nothing(browser: Browser, url: str, width: int, tmp_path: Path) -> None:
    browser.open(url, width)
    browser.screenshot(tmp_path / "page.png")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.title") == "Cohort out"
    assert browser.requested() == [url]
    assert browser.complaints() == []
    for picture in ("thumbnail", "overlay", "density", "crop"):
        shown = f"[...document.querySelectorAll('img[alt={picture}]')]"
        browser.evaluate(f"{shown}.forEach(image => image.loading = 'eager')")
        browser.wait_for(f"{shown}.length && {shown}.every(image => image.complete && image.naturalWidth > 1)")


def test_heads_sort_both_ways_and_what_has_no_value_is_last(browser: Browser, url: str) -> None:
    browser.open(url)
    nuclei, name = 5, 0
    counts = [count for count in browser.evaluate(COLUMN.format(nuclei)) if count != "–"]
    assert len(set(counts)) == 3
    click(browser, nuclei)
    assert browser.evaluate(COLUMN.format(nuclei)) == [*sorted(counts, key=int), "–"]
    click(browser, nuclei)
    assert browser.evaluate(COLUMN.format(nuclei)) == [*sorted(counts, key=int, reverse=True), "–"]
    click(browser, name)
    named = [text for text in browser.evaluate(COLUMN.format(name)) if text != MARKUP]
    assert named == ["b", "slide-9", "slide-10"], "numbers in names sort as numbers"


def test_the_filter_shows_what_has_the_text(browser: Browser, url: str) -> None:
    browser.open(url)
    typed = "const f = document.getElementById('filter'); f.value = {!r}; f.dispatchEvent(new Event('input'))"
    browser.evaluate("{ " + typed.format("SLIDE-1") + " }")
    assert browser.evaluate(COLUMN.format(0)) == ["slide-10"]
    assert browser.evaluate("document.getElementById('shown').textContent") == "1 of 4"
    browser.evaluate("{ " + typed.format("") + " }")
    assert len(browser.evaluate(COLUMN.format(0))) == 4


def test_a_name_leads_to_its_pictures(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.evaluate("[...document.querySelectorAll('#rows a')].find(a => a.textContent === 'b').click()")
    browser.wait_for("location.hash === '#slide-b'")
    top = browser.evaluate("document.getElementById('slide-b').getBoundingClientRect().top")
    assert top < browser.evaluate("innerHeight")

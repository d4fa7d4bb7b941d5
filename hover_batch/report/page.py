"""Write a report's HTML files with jinja2. All text is escaped, and the pages load nothing from elsewhere.

A report of up to SINGLE slides with pictures is a single file. With more, the pictures go to pages of PER_PAGE slides
in a folder next to the front page. Each is written once it is full, so that any cohort needs the memory of one page.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from hover_batch.files import write_atomically
from hover_batch.formatting import duration
from hover_batch.report.charts import HEIGHT, WIDTH
from hover_batch.report.content import Report, SlideDetail

SINGLE = 200
"""Largest number of slides whose pictures are on the front page."""
PER_PAGE = 100
"""Number of slides on each further page."""


class Pages:
    """Writer of a report's pages.

    `path`: file of the front page. `slides`: number of slides with pictures. `title`: title of all pages. Call `add`
    for each slide, in order, and then `close`. Both raise OSError if a file cannot be written.
    """

    def __init__(self, path: Path, slides: int, title: str) -> None:
        self.path = path
        self.folder = path.with_name(f"{path.stem}-slides")
        self.count = 0 if slides <= SINGLE else -(-slides // PER_PAGE)
        self._title = title
        self._waiting: list[SlideDetail] = []
        self._written = 0
        self._environment = page_environment("hover_batch.report")

    @property
    def next_page(self) -> str:
        """Link from the front page to the page with the next slide's pictures; "" if they are on the front page."""
        return self._link(self._written) if self.count else ""

    @property
    def to_front(self) -> str:
        """Relative link from the pages with pictures to the folder of the front page; "" if all pictures are on it."""
        return "../" if self.count else ""

    def add(self, detail: SlideDetail) -> None:
        """Add the pictures of the next slide. A further page is written once it has PER_PAGE slides.

        OSError if the page cannot be written.
        """
        self._waiting.append(detail)
        if self.count and len(self._waiting) == PER_PAGE:
            self._write_page()

    def close(self, report: Report) -> None:
        """Write the last page of pictures and the front page, whose content is `report`.

        Pages that an earlier report left are removed. Their folder is removed if it is then empty.

        OSError if a file cannot be written or removed.
        """
        if self.count and self._waiting:
            self._write_page()
        links = [self._link(number) for number in range(self.count)]
        self._write(self.path, "cohort.html", report=report, slides=self._waiting, pages=links)
        pages = [self.path.parent / link for link in links]
        if self.folder.is_dir():
            for stale in set(self.folder.glob("[0-9][0-9][0-9][0-9].html")) - set(pages):
                stale.unlink()
            if not pages and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _link(self, number: int) -> str:
        """Return the link from the front page to a page of pictures, counted from 0."""
        return f"{self.folder.name}/{number + 1:04}.html"

    def _write_page(self) -> None:
        """Write the waiting slides to the next page."""
        page = self._written + 1
        values = {"front": self.path.name, "title": self._title, "page": page, "count": self.count}
        self._write(self.path.parent / self._link(self._written), "slides.html", slides=self._waiting, **values)
        self._waiting = []
        self._written = page

    def _write(self, path: Path, template: str, **values: object) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self._environment.get_template(template).render(**values))


def page_environment(package: str) -> jinja2.Environment:
    """Return a Jinja environment with the templates of a package and of the report.

    It escapes HTML and raises an error for undefined names. It has the filters number, count, percent and duration, and
    the variables style, script, policy, width and height.

    `package`: name of a Python package with a folder `templates`.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in (package, "hover_batch.report")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    package_files = files("hover_batch.report") / "templates"
    script = (package_files / "table.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "width": WIDTH,
        "height": HEIGHT,
        # Files of this package: the only markup that is not escaped.
        "style": Markup((package_files / "style.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        # The browser refuses all other scripts, and everything from other hosts.
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    }
    environment.filters |= {
        "number": _number,
        "count": "{:,}".format,
        "percent": "{:.1%}".format,
        "duration": _duration,
    }
    return environment


def _number(value: float | None) -> str:
    """Format a number with three significant digits and thousands separators; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _duration(seconds: float | None) -> str:
    """Format a duration; a dash for None."""
    return "–" if seconds is None else duration(seconds)

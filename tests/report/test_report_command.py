"""`report`: its pages for runs of all kinds; all text is escaped, and nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import errno
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_run import record_table, write_field, write_run
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from hover_batch.cli import app
from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.record import SlideRecord
from hover_batch.export.summary import slide_summary
from hover_batch.report import page
from hover_batch.taxonomy import CONSEP
from hover_batch.uncertainty import CountError

MARKUP = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> & {{ 7 * 7 }}"

Field = tuple[Path, NDArray[np.int32], NDArray[np.uint8]]


class Page(HTMLParser):
    """The tags of a page with their attributes, its text, and the cells of each row of its tables by their ids."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"

    def all(self, name: str) -> list[str]:
        """Every value of an attribute."""
        return [value for _, attributes in self.tags for key, value in attributes.items() if key == name and value]


def report(out: Path | RunLayout, *arguments: str | Path) -> tuple[Result, Path]:
    """How it ended, and the file it named."""
    folder = out.root if isinstance(out, RunLayout) else out
    result = CliRunner().invoke(app, ["report", str(folder), *map(str, arguments)])
    return result, Path(result.stdout.strip())


def shown(out: Path | RunLayout) -> Page:
    result, path = report(out)
    assert result.exit_code == 0, result.output
    return Page(path)


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Field:
    return write_field(tmp_path_factory.mktemp("field"))


def test_a_run_of_segment_is_told_of(tmp_path: Path) -> None:
    """Two white tiles, which have no nuclei, and a broken file."""
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), np.full((200, 300, 3), 245, np.uint8))
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    (tmp_path / "cohort.csv").write_text("path,slide_id,mpp\na.png,a,0.25\nb.png,b.i-2,0.25\nbroken.svs,c,0.25\n")
    out = tmp_path / "out"
    assert CliRunner().invoke(app, ["segment", str(tmp_path / "cohort.csv"), "-o", str(out)]).exit_code == 3
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    page = shown(out)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "the run was touched"
    for words in ("2 done", "1 failed", "0 nuclei", "broken.svs: cannot be read", "There are no nuclei."):
        assert words in page.text, words
    # Provenance: the card from the store, the settings, the versions.
    for words in ("architecture unet", "CC BY-NC-SA", "min_area_px = 64", "tiatoolbox 2.1.", "model_sha256"):
        assert words in page.text, words
    assert {"slide-a", "slide-b.i-2"} <= set(page.all("id")) and "slide-c" not in page.all("id")
    again = CliRunner().invoke(app, ["segment", str(tmp_path / "cohort.csv"), "-o", str(out), "--force"])
    assert again.exit_code == 3
    assert not (out / "report.html").exists(), "a run started anew keeps the report of the old one"


def test_nothing_is_fetched_and_nothing_is_markup_but_ours(tmp_path: Path, field: Field) -> None:
    layout = write_run(tmp_path / "out", *field, done=["a"], failed=[(MARKUP, MARKUP)], group=MARKUP)
    layout.settings_toml.write_text(f'model = "{MARKUP}"\n')
    slide_json = layout.slide("a").slide_json
    slide_json.write_text(json.dumps(json.loads(slide_json.read_text()) | {"warnings": [MARKUP]}))
    page = shown(layout)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    # As texts: slide_id twice, reason, group in the table and at the pictures, settings, warning.
    assert page.text.count(MARKUP) == 7
    assert all(source.startswith("data:image/") for source in page.all("src"))
    assert all(re.match(r"#|slides/a/overlay\.jpg$", link) for link in page.all("href"))
    text = layout.report_html.read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "url(" not in text and "@import" not in text
    (policy,) = [content for content in page.all("content") if "default-src" in content]
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src 'sha256-" in policy


def test_figures_are_those_of_the_tables(tmp_path: Path, field: Field) -> None:
    layout = write_run(tmp_path / "out", *field, done=["a", "b"])
    page = shown(layout)
    summaries = [json.loads(layout.slide(name).slide_json.read_text())["summary"] for name in ("a", "b")]
    for summary in summaries:
        for column in ("nuclei", "tissue_mm2", "nuclei_per_mm2", "area_um2_p50"):
            assert str(summary[column]) in page.all("data-value")
        assert str(summary["n_spindle"] / summary["nuclei"]) in page.all("data-value")
    total = sum(summary["nuclei"] for summary in summaries)
    assert f"{total:,} nuclei" in page.text
    spindle = sum(summary["n_spindle"] for summary in summaries)
    assert f"spindle {spindle} {spindle / total:.1%}" in page.text
    # Class 1 never occurs: it is listed, and has no curve.
    assert "miscellaneous 0 0.0% 0" in page.text
    assert [tag for tag, _ in page.tags].count("polyline") == 3 * 3


def test_intervals_of_counts_are_shown_or_said_to_be_missing(tmp_path: Path, field: Field) -> None:
    layout = write_run(tmp_path / "out", *field, done=["a", "b"])
    assert "The error of these counts is not measured." in shown(layout).text
    error = CountError(mean=0.1, mean_variance=0.001, source=0.004, slide=0.003, field_mm2=0.002, unpaired=0.3, df=6)
    slides = []
    for name in ("a", "b"):
        path = layout.slide(name).slide_json
        done = json.loads(path.read_text())
        row = slide_summary(
            SlideRecord(slide_id=name, path=field[0], row=2), CONSEP, status="done",
            nuclei=layout.slide(name).nuclei_parquet, tissue_mm2=done["summary"]["tissue_mm2"], seconds={}, error=error,
        )  # fmt: skip
        path.write_text(json.dumps(done | {"summary": row}))
        slides.append((row["nuclei"], row["tissue_mm2"]))
    page = shown(layout)
    low, high = error.interval(slides) or (0, 0)
    assert f"{sum(n for n, _ in slides):,} ({low:,.0f} to {high:,.0f}) nuclei" in page.text
    assert "Intervals in brackets contain the true number of nuclei with a probability of 90 %" in page.text
    assert "not measured." in page.text and "The error of these counts is not measured." not in page.text


def test_crops_show_the_slide_with_its_contours(tmp_path: Path, field: Field) -> None:
    layout = write_run(tmp_path / "out", *field, done=["a"])
    shown(layout)
    text = layout.report_html.read_text(encoding="utf-8")
    crops = re.findall(r'src="data:image/jpeg;base64,([^"]+)" alt="crop".*?x (\d+), y (\d+) · (\d+) nuclei', text)
    assert len(crops) == 4
    image = cv2.imread(str(field[0]))
    assert image is not None
    for encoded, x0, y0, nuclei in crops:
        crop = cv2.imdecode(np.frombuffer(base64.b64decode(encoded), np.uint8), cv2.IMREAD_COLOR)
        assert crop is not None and crop.shape == (256, 256, 3) and int(nuclei) > 0
        there = image[int(y0) : int(y0) + 256, int(x0) : int(x0) + 256]
        far = np.abs(crop.astype(int) - there).max(axis=2) > 60
        assert 0 < far.mean() < 0.2, "all but the contours is the slide's"


def test_without_the_slide_the_crops_are_left_out(tmp_path: Path, field: Field) -> None:
    image = tmp_path / "moved.png"
    image.write_bytes(field[0].read_bytes())
    layout = write_run(tmp_path / "out", image, *field[1:], done=["a"])
    cv2.imwrite(str(image), np.zeros((400, 400, 3), np.uint8))
    assert f"{image} is not the file that was segmented" in shown(layout).text
    image.unlink()
    page = shown(layout)
    assert f"No crops: {image} does not exist" in page.text
    assert "crop" not in page.all("alt") and {"thumbnail", "overlay", "density"} <= set(page.all("alt"))


def test_unfinished_and_all_failed_and_nothing_listed(tmp_path: Path, field: Field) -> None:
    layout = write_run(tmp_path / "unfinished", *field, done=["a"], failed=[("b", "why not")], pending=["c", "d"])
    layout.slide("c").folder.mkdir()
    layout.slide("c").key_json.write_text("{}")
    text = shown(layout).text
    assert "1 of 4 slides are done, and only these are counted here; 2 are not done yet" in text
    assert "1 begun" in text and "1 pending" in text and "open: why not" in text

    page = shown(write_run(tmp_path / "failed", *field, failed=[("a", "first"), ("b", "second")]))
    assert "0 done" in page.text and "open: second" in page.text and not page.all("src")

    layout = write_run(tmp_path / "early", *field)
    layout.slides_csv.unlink()
    layout.versions_json.unlink()
    layout.settings_toml.unlink()
    text = shown(layout).text
    for words in (
        "slides.csv is not written yet: the run has not listed",
        "versions.json does not exist",
        "settings.toml does not exist",
    ):
        assert words in text

    assert "#failures" not in shown(write_run(tmp_path / "good", *field, done=["a"])).all("href")


def test_a_harmed_table_is_said_and_not_counted(tmp_path: Path, field: Field) -> None:
    layout = write_run(tmp_path / "out", *field, done=["a", "b"])
    layout.slide("b").nuclei_parquet.write_bytes(b"PAR1")
    layout.slide("a").overlay_jpg.write_bytes(b"no JPEG")
    layout.settings_toml.write_bytes(b"\xff\xfe")
    result, path = report(layout)
    assert result.exit_code == 0 and "note: Tables that cannot be read, and are not counted: 1." in result.stderr
    text = Page(path).text
    nuclei = json.loads(layout.slide("a").slide_json.read_text())["nuclei"]
    assert f"{nuclei} nuclei" in text and "Tables that cannot be read, and are not counted: 1." in text
    assert "cannot be read as a table of nuclei" in text and "Missing files: overlay.jpg." in text


def test_a_harmed_contour_costs_the_crops_alone(tmp_path: Path, field: Field) -> None:
    layout = write_run(tmp_path / "out", *field, done=["a"])
    path = layout.slide("a").nuclei_parquet
    with pq.ParquetFile(path) as file:
        table, about = file.read(), file.metadata.metadata
    where = table.schema.get_field_index("geometry")
    table = table.set_column(where, table.schema.field(where), pa.array([b"?"] * len(table), pa.binary()))
    pq.write_table(table.replace_schema_metadata({b"hover_batch": about[b"hover_batch"]}), path)
    record_table(layout.slide("a"))
    assert f"No crops: {path}: cannot be read as a table of nuclei" in shown(layout).text


def test_many_slides_have_pages(tmp_path: Path, field: Field, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SINGLE", 4)
    monkeypatch.setattr(page, "PER_PAGE", 2)
    layout = write_run(tmp_path / "out", *field, done=["a", "b", "c", "d", "e"])
    front = shown(layout)
    pages = sorted(layout.report_slides.iterdir())
    assert [path.name for path in pages] == ["0001.html", "0002.html", "0003.html"]
    assert not front.all("src")
    assert "report-slides/0003.html#slide-e" in front.all("href")
    for path in (layout.report_html, *pages):
        for link in Page(path).all("href"):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.is_file(), link
            assert not anchor or anchor in Page(target).all("id"), link
    assert [len(re.findall("<article", path.read_text("utf-8"))) for path in pages] == [2, 2, 1]

    # With fewer slides the next report is one file again, and leaves no page of the old one.
    monkeypatch.setattr(page, "SINGLE", 200)
    assert shown(layout).all("src")
    assert not layout.report_slides.exists()


def test_elsewhere_it_links_to_nothing_of_the_run(tmp_path: Path, field: Field) -> None:
    layout = write_run(tmp_path / "out", *field, done=["a"])
    result, path = report(layout, "-o", tmp_path / "new" / "cohort.html")
    assert result.exit_code == 0 and path == tmp_path / "new" / "cohort.html"
    assert "[1/1] a" in result.stderr
    assert all(link.startswith("#") for link in Page(path).all("href"))
    assert not layout.report_html.exists()


def test_what_cannot_be_is_refused(tmp_path: Path, field: Field) -> None:
    layout = write_run(tmp_path / "out", *field, done=["a"])
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ((tmp_path / "empty",), "holds no run"),
        ((layout.root, "-o", tmp_path / "file" / "x.html"), "cannot be written (File exists); give a file"),
        ((layout.root, "-o", tmp_path / "empty"), "is a folder; give the path of a file"),
        ((layout.root, "-o", tmp_path / "file"), "must end in .html or .htm; change the ending"),
    ]:
        result, _ = report(*arguments)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.split()) and not result.stdout


def test_a_file_of_the_run_that_cannot_be_read_is_named(
    tmp_path: Path, field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = write_run(tmp_path / "out", *field, done=["a"])
    layout.settings_toml.write_text("")
    real = Path.read_text

    def refuse(path: Path, *arguments: Any, **named: Any) -> str:
        if path == layout.settings_toml:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", refuse)
    result, _ = report(layout)
    assert result.exit_code == 1
    assert f"Error: {layout.settings_toml}: Permission denied; check that it" in result.stderr

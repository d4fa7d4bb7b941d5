"""`hover-batch diff`: planted differences are found and sized, other slides are refused, and the page shows places."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import shapely
from made_run import record_table, write_run
from typer.testing import CliRunner, Result

from hover_batch.cli import app
from hover_batch.cohort.layout import RunLayout
from hover_batch.taxonomy import CONSEP

Alter = Callable[[pa.Table], pa.Table]
IDS = tuple(f"s{i}" for i in range(10))
ALL = IDS[-1]
"""The slide with all nuclei of the tile; the n-th other one has n tenths of them."""


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of a real tile with its annotated nuclei."""
    folder = tmp_path_factory.mktemp("first")
    image = shutil.copy(data / "nuclei" / "images" / "consep_train_03.png", folder)
    labels, types = (
        cv2.imread(str(data / "nuclei" / kind / "consep_train_03.png"), cv2.IMREAD_UNCHANGED)
        for kind in ("labels", "types")
    )
    assert labels is not None and types is not None
    write_run(folder / "A", Path(image), labels.astype(np.int32), np.minimum(types, 4).astype(np.uint8), done=IDS)
    return folder / "A"


@pytest.fixture
def second(first: Path, tmp_path: Path) -> RunLayout:
    """A copy of that run, to be altered."""
    shutil.copytree(first, tmp_path / "B")
    return RunLayout(tmp_path / "B")


def alter(run: RunLayout, change: Alter, *slide_ids: str, taxonomy: dict[str, Any] | None = None) -> None:
    """Replace the tables of some slides by what `change` makes of them, and note a name of another model."""
    for slide_id in slide_ids:
        slide = run.slide(slide_id)
        with pq.ParquetFile(slide.nuclei_parquet) as file:
            table, metadata = file.read(), {key: file.metadata.metadata[key] for key in (b"geo", b"hover_batch")}
        context = json.loads(metadata[b"hover_batch"]) | {"model": {"id": "other", "sha256": "1"}}
        if taxonomy is not None:
            context["taxonomy"] = taxonomy
        metadata[b"hover_batch"] = json.dumps(context).encode()
        pq.write_table(change(table).replace_schema_metadata(metadata), slide.nuclei_parquet)
        record_table(slide)


def diff(first: Path, second: Path | RunLayout, *arguments: str | Path) -> Result:
    folder = second.root if isinstance(second, RunLayout) else second
    return CliRunner().invoke(app, ["diff", str(first), str(folder), *map(str, arguments)])


def found(first: Path, second: Path | RunLayout, tmp_path: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    """The content of the JSON file, with the slides by their ids."""
    result = diff(first, second, "--json", tmp_path / "diff.json", *arguments)
    assert result.exit_code == code, result.output
    content: dict[str, Any] = json.loads((tmp_path / "diff.json").read_text())
    return content | {"slides": {slide["slide_id"]: slide for slide in content["slides"]}}


def every(table: pa.Table, step: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """True for every `step`-th nucleus."""
    return np.arange(len(table)) % step == step - 1


def without(table: pa.Table, step: int = 20) -> pa.Table:
    return table.filter(pa.array(~every(table, step)))


def swapped(table: pa.Table, step: int = 33) -> pa.Table:
    """Every `step`-th nucleus has the next class."""
    ids = table["type_id"].to_numpy()
    ids = np.where(every(table, step), ids % 4 + 1, ids).astype(np.uint8)
    return table.set_column(table.schema.get_field_index("type_id"), table.schema.field("type_id"), pa.array(ids))


def shifted(table: pa.Table, by: float = 2.0) -> pa.Table:
    """All contours and boxes are `by` pixels further right."""
    moved = shapely.transform(shapely.from_wkb(table["geometry"].to_numpy()), lambda points: points + [by, 0])
    box, kind = table["bbox"].combine_chunks(), table.schema.field("bbox")
    parts = [pa.array(part.to_numpy() + along) for part, along in zip(box.flatten(), (by, 0, by, 0), strict=True)]
    table = table.set_column(
        table.schema.get_field_index("bbox"), kind, pa.StructArray.from_arrays(parts, fields=list(kind.type))
    )
    geometry = pa.array(shapely.to_wkb(moved), pa.binary())
    return table.set_column(table.schema.get_field_index("geometry"), table.schema.field("geometry"), geometry)


def own_iou(path: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    """IoU of each nucleus with itself when it is shifted."""
    with pq.ParquetFile(path) as file:
        before, after = (shapely.from_wkb(t["geometry"].to_numpy()) for t in (file.read(), shifted(file.read())))
    shared = shapely.area(shapely.intersection(before, after))
    return np.asarray(shared / (2 * shapely.area(before) - shared))


def test_a_run_does_not_differ_from_itself(first: Path, tmp_path: Path) -> None:
    content = found(first, first, tmp_path, "--tolerance", "0%", "--min-matched", "100%")
    assert len(content["slides"]) == len(IDS) and not content["faults"] and not content["places"]
    for slide in content["slides"].values():
        assert slide["identical"] and slide["matched"] == slide["nuclei"]["a"] == slide["nuclei"]["b"] > 0
        assert slide["only_a"] == slide["only_b"] == slide["class_changed"] == 0


def test_equal_nuclei_in_other_files_are_all_matched(first: Path, second: RunLayout, tmp_path: Path) -> None:
    alter(second, lambda table: table, ALL)
    slide = found(first, second, tmp_path)["slides"][ALL]
    assert not slide["identical"] and slide["matched"] == slide["nuclei"]["a"] == slide["nuclei"]["b"]
    assert slide["iou"] == {"median": 1, "p5": 1} and slide["area_ratio"]["median"] == 1
    assert slide["class_changed"] == 0


def test_planted_differences_are_sized(first: Path, second: RunLayout, tmp_path: Path) -> None:
    alter(second, without, ALL)
    alter(second, swapped, "s8")
    alter(second, shifted, "s7")
    content = found(first, second, tmp_path)
    slides = content["slides"]
    n = {slide_id: slides[slide_id]["nuclei"]["a"] for slide_id in IDS}
    dropped = slides[ALL]
    assert (dropped["only_a"], dropped["only_b"], dropped["class_changed"]) == (n[ALL] // 20, 0, 0)
    assert dropped["endpoints"]["nuclei"]["relative"] == pytest.approx(-(n[ALL] // 20) / n[ALL])
    assert dropped["unit"] == "nuclei per mm2 of tissue"
    assert (slides["s8"]["class_changed"], slides["s8"]["only_a"], slides["s8"]["only_b"]) == (n["s8"] // 33, 0, 0)
    moved = slides["s7"]
    own = own_iou(RunLayout(first).slide("s7").nuclei_parquet)
    assert moved["matched"] == (own > 0.5).sum() > 0.8 * n["s7"] and moved["only_a"] == moved["only_b"]
    assert moved["iou"]["median"] == pytest.approx(np.median(own[own > 0.5])) and moved["area_ratio"]["median"] == 1
    assert list(slides)[0] == ALL, "the slide that differs most comes first"
    change = content["cohort"]["relative_change"]["nuclei"]
    # Rows 2 to 11 of the cohort have patients row // 2, two slides each.
    assert content["cohort"]["unit"] == "patients" and change["n"] == 5
    assert change["mean"] == pytest.approx(dropped["endpoints"]["nuclei"]["relative"] / 2 / 5)
    by_patient = [0.0, 0.0, 0.0, 0.0, dropped["endpoints"]["nuclei"]["relative"] / 2]
    expected = scipy.stats.ttest_1samp(by_patient, 0).confidence_interval(0.95)
    assert (change["low"], change["high"]) == pytest.approx((expected.low, expected.high))


def test_the_other_direction_is_the_mirror_image(first: Path, second: RunLayout, tmp_path: Path) -> None:
    alter(second, lambda table: without(swapped(shifted(table))), *IDS)
    there, back = found(first, second, tmp_path)["slides"], found(second.root, first, tmp_path)["slides"]
    for slide_id in IDS:
        a, b = there[slide_id], back[slide_id]
        assert a["confusion"]["counts"] == np.transpose(b["confusion"]["counts"]).tolist()
        assert (a["only_a"], a["only_b"], a["matched"]) == (b["only_b"], b["only_a"], b["matched"])
        assert a["iou"] == pytest.approx(b["iou"])


def test_limits_decide_the_exit_code(first: Path, second: RunLayout) -> None:
    alter(second, without, ALL)
    assert diff(first, second).exit_code == 0
    assert diff(first, second, "--tolerance", "6%").exit_code == 0
    outside = diff(first, second, "--tolerance", "1%")
    assert outside.exit_code == 3 and f"outside the limits: {ALL}: nuclei -" in outside.stdout
    assert outside.stdout.count("outside the limits") == 1
    assert diff(first, second, "--tolerance", "6%", "--min-matched", "99%").exit_code == 3
    assert diff(first, second, "--tolerance", "60%", "--of", "spindle").exit_code == 0
    for arguments in (
        ("--tolerance", "1"),
        ("--tolerance", "-1%"),
        ("--of", "nothing"),
        ("--html", "none/x.html"),
        ("--json", "d", "--html", "d"),
    ):
        assert diff(first, second, *arguments).exit_code == 2, arguments


def test_slides_of_one_run_are_listed(first: Path, second: RunLayout, tmp_path: Path) -> None:
    second.slide("s1").slide_json.unlink()
    content = found(first, second, tmp_path)
    assert content["not_compared"] == [
        {
            "slide_id": "s1",
            "done_in": "A",
            "reason": "B: is not done; see failures.csv, or repeat the segment command to finish it",
        }
    ]
    assert (
        "s1: done in A only (B: is not done; see failures.csv, or repeat the segment command to finish it)"
        in found(first, second, tmp_path, "--tolerance", "1%", code=3)["faults"]
    )
    second.slide("s2").nuclei_parquet.write_bytes(b"no table")
    content = found(first, second, tmp_path, code=3)
    assert [(m["slide_id"], m["done_in"]) for m in content["not_compared"]] == [("s1", "A"), ("s2", "both")]
    for slide_id in IDS:
        second.slide(slide_id).slide_json.unlink(missing_ok=True)
    assert found(first, second, tmp_path, code=4)["slides"] == {}


def test_other_slides_are_refused(first: Path, second: RunLayout, tmp_path: Path) -> None:
    survey = second.slide("s3").survey_json
    content = json.loads(survey.read_text())
    content["slide"]["fingerprint"] = "0"
    survey.write_text(json.dumps(content))
    result = diff(first, second)
    assert result.exit_code == 2 and "s3: another file" in result.stderr and "Give runs on" in result.stderr
    second.slides_csv.write_text(re.sub(r",s(\d)", r",t\1", second.slides_csv.read_text()))
    assert "no slide_id in common" in diff(first, second).stderr
    assert "holds no run" in diff(first, tmp_path).stderr


def test_unlike_classes_are_named(first: Path, second: RunLayout, tmp_path: Path) -> None:
    taxonomy: Any = CONSEP.to_json()
    taxonomy["classes"][4]["name"] = "fibroblast"
    alter(second, lambda table: table, *IDS, taxonomy=taxonomy)
    content = found(first, second, tmp_path)
    assert content["cohort"]["classes_only_in_a"] == ["spindle"]
    assert content["cohort"]["classes_only_in_b"] == ["fibroblast"]
    counts = content["slides"][ALL]["confusion"]
    spindle = counts["counts"][counts["rows"].index("spindle")][counts["columns"].index("fibroblast")]
    assert content["slides"][ALL]["class_changed"] == spindle > 0
    assert content["slides"][ALL]["endpoints"]["fibroblast"]["relative"] is None
    assert "classes that only B has: fibroblast" in diff(first, second).stdout


def test_the_page_shows_the_places(first: Path, second: RunLayout, tmp_path: Path) -> None:
    alter(second, without, ALL, "s3")
    run = json.loads(second.run_json.read_text()) | {"model_id": "<script>alert(1)</script>"}
    second.run_json.write_text(json.dumps(run))
    page = tmp_path / "diff.html"

    def shown() -> str:
        assert diff(first, second, "--html", page).exit_code == 0
        return page.read_text()

    text = shown()
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and "://" not in text
    assert text.count("data:image/jpeg") == 3 * text.count('<div class="slide">') > 0
    assert "thumbnail.jpg" not in text
    image = first.parent / "consep_train_03.png"
    image.rename(image.with_suffix(".away"))
    try:
        text = shown()
    finally:
        image.with_suffix(".away").rename(image)
    # s9 has no thumbnail, s3 has one.
    assert "from thumbnail.jpg, since" in text and "no picture: " in text and "does not exist" in text


def test_what_would_be_lost_or_missed_is_refused_before_the_work(first: Path, tmp_path: Path) -> None:
    for arguments, message in (
        (["--json", first / "run.json"], "which must not change"),
        (["--html", first / "report.html"], "which must not change"),
        (["--json", tmp_path / "cohort.csv"], "must end in .json"),
        (["--html", "/proc/x.html"], "cannot be written"),
        (["--min-matched", "200%"], "--min-matched 200%: must be at most 100%"),
    ):
        result = diff(first, first, *arguments)
        assert result.exit_code == 2 and message in result.stderr and "slides 0/" not in result.stderr, result.output
    result = CliRunner().invoke(app, ["diff", "s3://bucket/run", str(first)])
    assert result.exit_code == 2 and "s3://bucket/run: is a URL" in result.stderr

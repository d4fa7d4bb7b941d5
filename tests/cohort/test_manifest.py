"""Cohorts from a CSV, a folder or a glob, and the faults and warnings that are reported."""

from __future__ import annotations

import csv
import gzip
import io
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hover_batch.cohort.manifest import Cohort, RowFault, raise_if_faulty, read_cohort
from hover_batch.cohort.near_name import near_name
from hover_batch.errors import InputError
from hover_batch.geometry import Mpp


def write(folder: Path, text: str | bytes, name: str = "cohort.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """A folder in which files a.svs, b.tif and c/a.svs exist; slides are not opened here."""
    for name in ("a.svs", "b.tif", "c/a.svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a slide")
    return tmp_path


def messages(cohort: Cohort) -> list[tuple[int, str]]:
    return [(fault.row, fault.message) for fault in cohort.faults]


# A sound CSV


def test_the_real_cohort(data: Path, tmp_path: Path) -> None:
    with open(data / "nuclei" / "dataset.csv", newline="") as file:
        tiles = [data / "nuclei" / row["image"] for row in csv.DictReader(file)][:2]
    table = write(
        tmp_path,
        "path,mpp,group\n"
        f"{data}/slides/CMU-1-Small-Region.svs,,20x\n"
        f"{data}/slides/TCGA-V5-A7RE_40x_colsW.tif,,40x\n"
        f"{data}/slides/broken.svs,,20x\n" + "".join(f"{tile},0.25,40x\n" for tile in tiles),
    )
    cohort = read_cohort(table)
    assert cohort.faults == () and cohort.warnings == ()
    assert [record.slide_id for record in cohort.records] == [
        "CMU-1-Small-Region",
        "TCGA-V5-A7RE_40x_colsW",
        "broken",
        *(tile.stem for tile in tiles),
    ]
    assert [record.mpp for record in cohort.records] == [None, None, None, Mpp(0.25, 0.25), Mpp(0.25, 0.25)]
    raise_if_faulty(cohort)


def test_every_column(slides: Path) -> None:
    (slides / "mask.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    (slides / "dicom").mkdir()
    (slides / "dicom" / "1.DCM").write_bytes(b"")
    cohort = read_cohort(
        write(
            slides,
            "path,slide_id,mpp,magnification,mask_path,patient_id,group,Age,site\n"
            "a.svs,s1,0.25,40,mask.geojson,p1,case,61,\n"
            f"{slides}/dicom,,,,,,,,Graz\n",
        )
    )
    assert cohort.faults == ()
    first, second = cohort.records
    assert (first.slide_id, first.path, first.row) == ("s1", slides / "a.svs", 2)
    assert (first.mpp, first.magnification, first.mask_path) == (Mpp(0.25, 0.25), 40.0, slides / "mask.geojson")
    assert (first.patient_id, first.group, dict(first.extra)) == ("p1", "case", {"Age": "61", "site": ""})
    assert (second.slide_id, second.path, second.row) == ("dicom", slides / "dicom", 3)
    assert (second.mpp, second.magnification, second.mask_path, second.patient_id) == (None, None, None, None)
    assert dict(second.extra) == {"Age": "", "site": "Graz"}


@pytest.mark.parametrize(
    "header", ["wsi,sample,slide_mpp", "slide,slide_id,mpp", "\ufeff Path , Slide ID,MPP", "WSI,SAMPLE,Slide-MPP"]
)
def test_aliases_case_spaces_and_byte_order_mark(slides: Path, header: str) -> None:
    (record,) = read_cohort(write(slides, f"{header}\r\n a.svs , one,0.5 \r\n")).records
    assert (record.path, record.slide_id, record.mpp) == (slides / "a.svs", "one", Mpp(0.5, 0.5))


def test_a_relative_csv_gives_absolute_paths(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(slides / "c", "path\na.svs\n../b.tif\n")
    monkeypatch.chdir(slides)
    cohort = read_cohort("c/cohort.csv")
    assert cohort.faults == ()
    assert all(record.path.is_absolute() and record.path.is_file() for record in cohort.records)


def test_empty_lines_short_rows_and_unnamed_columns(slides: Path) -> None:
    cohort = read_cohort(write(slides, ",path,group,\nNA,a.svs,NA\n\n,,,\n1,b.tif,x,,,\n"))
    assert cohort.faults == ()
    assert [(r.slide_id, r.row, r.group) for r in cohort.records] == [("a", 2, None), ("b", 5, "x")]
    assert "without a name" in cohort.warnings[0] and "read as empty: 1 in column group;" in cohort.warnings[1]
    failed = read_cohort(write(slides, "path,group\na.svs,#REF!\n"))
    assert failed.records[0].group is None and "cells with #REF! are read as empty: 1" in failed.warnings[0]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("first", ["", "sep={}\r\n", '"sep={}"\r\n', "\ufeffsep={}\n\n"])
def test_delimiters_and_decimal_commas_of_excel(slides: Path, mark: str, first: str) -> None:
    header, row = ["slide_id", '"WSI"', "mpp", "magnification", "note"], ["x", "a.svs", '"0,2527"', '"40,0"', '"1,250"']
    text = first.format(mark) + "".join(mark.join(cells) + "\r\n" for cells in (header, row))
    cohort = read_cohort(write(slides, text))
    assert (cohort.faults, cohort.warnings) == ((), ())
    (record,) = cohort.records
    assert (record.slide_id, record.mpp, record.magnification) == ("x", Mpp(0.2527, 0.2527), 40)
    assert (dict(record.extra), record.row) == ({"note": "1,250"}, len(text.splitlines()))


def test_unquoted_decimal_commas_are_a_fault(slides: Path) -> None:
    cohort = read_cohort(write(slides, "path,mpp,group\na.svs,0,25\n"))
    assert cohort.records == () and "mpp '0': write" in cohort.faults[0].message


def test_warnings_are_shown_beside_faults(slides: Path) -> None:
    cohort = read_cohort(write(slides, "path,slide_id,Status\na.svs,x,\na.svs,y,\nnone.svs,z,\n"))
    with pytest.raises(InputError) as caught:
        raise_if_faulty(cohort)
    assert "row 4 (z)" in str(caught.value)
    assert all(f"  warning: {warning}\n" in str(caught.value) for warning in cohort.warnings)
    assert len(cohort.warnings) == 2


def test_columns_that_a_run_writes_are_renamed(slides: Path) -> None:
    cohort = read_cohort(write(slides, "path,Status\na.svs,tumour\n"))
    assert dict(cohort.records[0].extra) == {"cohort_status": "tumour"}
    assert "column Status becomes cohort_status" in cohort.warnings[0]


def test_one_file_under_two_ids_is_warned_of(slides: Path) -> None:
    cohort = read_cohort(write(slides, "path,slide_id\na.svs,x\nc/../a.svs,y\n"))
    assert cohort.faults == () and cohort.warnings == ("row 3 (y) is the same slide as row 2",)


CELL = st.text(st.sampled_from(list('ab ,"\n\r\t;é')), max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELL, st.sampled_from(["", "\n", "\r\n", ",\r\n\n"])), min_size=1, max_size=6))
@example([("line one\nline two\r\nline three", ""), ("", "")])
def test_rows_are_lines_of_the_file(slides: Path, cells: list[tuple[str, str]]) -> None:
    text, expected = "path,slide_id,note\n", []
    for index, (cell, blank) in enumerate(cells):
        expected.append(len(io.StringIO(text, newline="").readlines()) + 1)
        quoted = cell.replace('"', '""')
        text += f'a.svs,s{index},"{quoted}"\n{blank}'
    cohort = read_cohort(write(slides, text))
    assert [record.row for record in cohort.records] == expected
    assert [record.extra["note"] for record in cohort.records] == [cell.strip() for cell, _ in cells]


# Faults of rows


def test_all_faults_of_all_rows_at_once(slides: Path) -> None:
    (slides / "mask.png").write_bytes(b"no image")
    (slides / "mask.json").write_text('{"type": ')
    (slides / "mask.tif").write_bytes(b"")
    cohort = read_cohort(
        write(
            slides,
            "path,slide_id,mpp,magnification,mask_path,note\n"
            'a.svs,good,0.25,,,"two\nlines"\n'
            "missing.svs,m,,,,\n"
            "b.tif,../x,,,,\n"
            "c/a.svs,GOOD,,,,\n"
            "c,folder,,,,\n"
            ",nothing,,,,\n"
            'b.tif,n1,"1,250",,,\n'
            "b.tif,n2,-1,forty,,\n"
            "b.tif,k1,,,mask.png,\n"
            "b.tif,k2,,,mask.json,\n"
            "b.tif,k3,,,mask.tif,\n"
            "b.tif,k4,,,none.png,\n"
            "b.tif,long,,,,a,b\n",
        )
    )
    assert [record.slide_id for record in cohort.records] == ["good"]
    expected = [
        (4, "missing.svs: no such file"),
        (
            5,
            "slide_id '../x' may contain only A-Z a-z 0-9 . _ - and must start with a letter or digit; "
            "use for example x",
        ),
        (6, "slide_id 'GOOD' is also that of row 2 (upper and lower case count as the same); use for example GOOD-2"),
        (7, "is a folder without DICOM files; give the slide's own file"),
        (8, "path is empty"),
        (9, "mpp '1,250': write the pixel size in µm as a number, for example 0.25"),
        (10, "mpp '-1': write"),
        (10, "magnification 'forty': write"),
        (11, "mask.png: is not a PNG image; save it again as PNG"),
        (12, "(char 9)); export it again as GeoJSON"),
        (13, "mask.tif: unknown kind of mask; known are .geojson, .geojson.gz, .json, .json.gz, .zip, .png"),
        (14, "none.png: no such file"),
        (15, "has 1 more cells than the header"),
    ]
    assert [row for row, _ in messages(cohort)] == [row for row, _ in expected]
    for (_, message), (_, part) in zip(messages(cohort), expected, strict=True):
        assert part in message

    with pytest.raises(InputError) as caught:
        raise_if_faulty(cohort)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(expected) + 2
    assert lines[0] == f"{slides}/cohort.csv: 13 faults, nothing was run"
    assert lines[1].startswith("  row 4 (m): path ")
    assert "Correct these rows" in lines[-1] and "--skip-invalid" in lines[-1]
    assert caught.value.exit_code == 2


def test_stems_that_collide_are_told_apart_by_their_folder(slides: Path) -> None:
    cohort = read_cohort(write(slides, "path\na.svs\nc/a.svs\nc/../a.svs\n"))
    assert [record.row for record in cohort.records] == [2]
    assert [message.rpartition(" ")[2] for _, message in messages(cohort)] == ["c-a", "a-2"]


def test_a_suggestion_is_no_id_of_a_later_row_nor_an_earlier_suggestion(slides: Path) -> None:
    cohort = read_cohort(write(slides, "path,slide_id\na.svs,x\nb.tif,x\nc/a.svs,x-2\nb.tif,X\n"))
    assert [(row, message.rpartition(" ")[2]) for row, message in messages(cohort)] == [(3, "x-3"), (5, "X-4")]


def test_a_stem_that_does_not_fit(slides: Path) -> None:
    (slides / "Fall 12 (HE).svs").write_bytes(b"")
    (fault,) = read_cohort(write(slides, "path\nFall 12 (HE).svs\n")).faults
    assert (fault.row, fault.slide_id_or_path) == (2, "Fall 12 (HE).svs")
    assert fault.message.endswith("give it a slide_id, for example Fall-12-HE")


@pytest.mark.parametrize("value", ["nan", "inf", "0", "-0.25", "1e9", "0_25", "0.25um", "?"])
def test_sizes_that_are_none(slides: Path, value: str) -> None:
    cohort = read_cohort(write(slides, f"path,mpp,magnification\na.svs,{value},{value}\n"))
    assert not cohort.records and [f.message.split()[0] for f in cohort.faults] == ["mpp", "magnification"]


def test_a_pipe_is_no_slide(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.svs")
    (fault,) = read_cohort(write(tmp_path, "path\np.svs\n")).faults
    assert fault.message.endswith("is not a regular file")


def test_a_path_beyond_what_the_system_takes(tmp_path: Path) -> None:
    (fault, *_) = read_cohort(write(tmp_path, f"path\n{'x' * 5000}.svs\n")).faults
    assert "cannot be read" in fault.message


# Sources that hold no rows


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (b"", "is empty"),
        (b"\n,,\n", "is empty"),
        (b"path,slide_id\n", "no slides"),
        (b"path,slide_id\n,\n\n", "no slides"),
        (b"slide_id,mpp\na,0.25\n", "no column path (or wsi, slide) among slide_id, mpp"),
        (b"path|slide_id\na.svs|a\n", "separated by commas, semicolons or tabs"),
        (b"path,wsi,mpp,slide_mpp\na,b,c,d\n", "columns path and wsi both mean path: keep one; columns mpp and"),
        (b"path,note,Note\na,b,c\n", "columns note and Note both mean note"),
        ("path\na.svs\n".encode("utf-16"), "is not UTF-8 text"),
        (b"path\nPr\xe4parat.svs\n", "CSV UTF-8 or, if it is a slide such as a DICOM file, give its folder"),
        (b"path\na\0.svs\n", "zero bytes"),
        (b"PK\x03\x04\x14\0", "is a spreadsheet or an archive, not a CSV; save the table as CSV UTF-8"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "is a spreadsheet"),
        (b'path,note\na.svs,"never closed\nb.tif,\n', "record from line 2 on is not CSV"),
    ],
)
def test_a_file_that_is_no_cohort(tmp_path: Path, text: bytes, part: str) -> None:
    with pytest.raises(InputError) as caught:
        read_cohort(write(tmp_path, text))
    assert part in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "cohort.csv"))


@pytest.mark.parametrize("source", ["", "none.csv", "none/*.svs", "a.csv/b.csv"])
def test_no_such_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "path\n", "a.csv")
    with pytest.raises(InputError):
        read_cohort(source)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80) | st.text(max_size=60).map(lambda rest: f"path,slide_id,mpp\n{rest}".encode()))
def test_whatever_the_file_holds_the_answer_is_a_cohort_or_an_input_error(tmp_path: Path, content: bytes) -> None:
    try:
        cohort = read_cohort(write(tmp_path, content))
    except InputError:
        return
    assert cohort.records or cohort.faults


# Folders and globs


def test_a_folder(slides: Path) -> None:
    for name in ("z.NDPI", "m.mrxs", ".a.svs", "._b.tif", "notes.txt"):
        (slides / name).write_bytes(b"")
    (slides / "m").mkdir()
    (slides / "dicom").mkdir()
    (slides / "dicom" / "1.dcm").write_bytes(b"")
    cohort = read_cohort(slides)
    assert [(r.slide_id, r.row, r.path) for r in cohort.records] == [
        ("a", 1, slides / "a.svs"),
        ("b", 2, slides / "b.tif"),
        ("dicom", 3, slides / "dicom"),
        ("m", 4, slides / "m.mrxs"),
        ("z", 5, slides / "z.NDPI"),
    ]
    assert cohort.faults == ()
    assert cohort.warnings == (f"{slides}: skipped 2 that do not look like slides: c, notes.txt",)


def test_stems_of_a_folder_collide(slides: Path) -> None:
    (slides / "a.png").write_bytes(b"")
    (fault,) = read_cohort(slides).faults
    assert fault == RowFault(2, str(slides / "a.svs"), fault.message)
    assert fault.message.startswith("slide_id 'a' is also that of row 1")


def test_a_glob(slides: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(slides)
    assert [r.path for r in read_cohort("*.svs").records] == [slides / "a.svs"]
    cohort = read_cohort("**/*.svs")
    assert [r.path for r in cohort.records] == [slides / "a.svs"]
    assert [fault.row for fault in cohort.faults] == [2]


def test_one_slide_or_dicom_folder_is_a_cohort(tmp_path: Path) -> None:
    (tmp_path / "a.svs").write_bytes(b"")
    assert [r.slide_id for r in read_cohort(tmp_path / "a.svs").records] == ["a"]
    (tmp_path / "case.1").mkdir()
    (tmp_path / "case.1" / "1.dcm").write_bytes(b"")
    assert [r.slide_id for r in read_cohort(tmp_path / "case.1").records] == ["case.1"]


def test_a_folder_without_slides(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"")
    with pytest.raises(InputError, match="no slide found"):
        read_cohort(tmp_path)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/Pr\xe4parat.svs")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    texts = [fault.message for fault in read_cohort(tmp_path).faults]
    assert "rename it" in texts[0] and "for example Praparat" not in texts[0]


def test_paths_may_be_urls(tmp_path: Path) -> None:
    """A file: URL is a file; a chained one or a query in S3 is a fault; what may be secret is not shown."""
    (tmp_path / "c.svs").touch()
    (tmp_path / "cohort.csv").write_text(
        f"path\ns3://bucket/x/a.svs\ns3://bucket/scan.1/\nfile://{tmp_path}/c.svs\nhttps://me:word@host/b.svs?key=word\n"
        "zip://me:word@d.svs::s3://bucket/x.zip\ns3://bucket/x/a.svs\ns3://bucket/d.svs?word\n"
    )
    cohort = read_cohort(tmp_path / "cohort.csv")
    assert [(r.slide_id, str(r.path)) for r in cohort.records] == [
        ("a", "s3://bucket/x/a.svs"),
        ("scan.1", "s3://bucket/scan.1/"),
        ("c", f"{tmp_path}/c.svs"),
        ("b", "https://host/b.svs"),
    ]
    assert [fault.row for fault in cohort.faults] == [6, 7, 8]
    assert "word" not in str(cohort) and "has a ?, which s3:// URLs may not have" in cohort.faults[2].message
    assert "chained" in cohort.faults[0].message and "x-a" in cohort.faults[1].message


def test_invisible_characters_around_cells_are_dropped(slides: Path) -> None:
    """Windows begins a copied path with U+202A."""
    cohort = read_cohort(write(slides, "\u200bpath\u200b,mpp\xa0\n\u202aa.svs\u202c,\ufeff0.25\n"))
    assert cohort.faults == () and [(r.path, r.mpp) for r in cohort.records] == [(slides / "a.svs", Mpp(0.25, 0.25))]


def test_file_uris_name_files_of_this_machine(slides: Path) -> None:
    (slides / "mask.geojson").write_text("{}")
    place = f"file://localhost{slides}"
    text = (
        f"path,slide_id,mask_path\n{place}/a.svs,a,FILE://{slides}/mask.geojson\na.svs,b,https://me:word@host/m.png\n"
    )
    cohort = read_cohort(write(slides, text))
    assert [(r.path, r.mask_path) for r in cohort.records] == [(slides / "a.svs", slides / "mask.geojson")]
    ((row, message),) = messages(cohort)
    assert row == 3 and message.startswith("mask_path https://host/m.png: a mask is not read from a URL; copy it")
    cohort = read_cohort(write(slides, "path\nfile:///C:/slides/a.svs\n"))
    assert "give a Windows path as this machine sees it" in messages(cohort)[0][1]


# Near misses


def test_mpp_along_x_and_y(slides: Path) -> None:
    text = "path,slide_id,mpp,MPP-X,mpp_y\na.svs,a,,0.25,0.5\na.svs,b,0.5,0.5,0.5\na.svs,c,0.3,,\na.svs,d,,,\n"
    cohort = read_cohort(write(slides, text))
    assert [record.mpp for record in cohort.records] == [Mpp(0.25, 0.5), Mpp(0.5, 0.5), Mpp(0.3, 0.3), None]
    assert cohort.faults == () and not any("column" in warning for warning in cohort.warnings)


def test_faults_of_mpp_along_x_and_y(slides: Path) -> None:
    text = "path,slide_id,mpp,mpp_x,mpp_y\na.svs,a,,0.25,\na.svs,b,0.5,0.25,0.5\na.svs,c,,?,-1\na.svs,d,,,0.5\n"
    cohort = read_cohort(write(slides, text))
    assert [row for row, _ in messages(cohort)] == [2, 3, 4, 4, 5]
    parts = ["mpp_x is given alone", "mpp 0.5 and mpp_x, mpp_y 0.25, 0.5 differ", "mpp_x '?'", "mpp_y '-1'", "mpp_y is"]
    assert all(part in message for part, (_, message) in zip(parts, messages(cohort), strict=True))


@pytest.mark.parametrize("column", ["mask", "Mask file", "masks", "mpp_z", "MPP (µm)", "mppx"])
def test_a_column_that_is_nearly_a_known_one_is_warned_of(slides: Path, column: str) -> None:
    cohort = read_cohort(write(slides, f"path,{column}\na.svs,1\n"))
    (warning,) = cohort.warnings
    assert f"column {column} is not used" in warning and ("mask_path" in warning or "mpp, mpp_x, mpp_y" in warning)
    assert dict(cohort.records[0].extra) == {column: "1"}


@pytest.mark.parametrize("name", ["mask.geojson.gz", "mask.geojson", "mask.JSON"])
def test_masks_as_qupath_and_we_write_them(slides: Path, name: str) -> None:
    for text in (b"[]", b"\xef\xbb\xbf{}", gzip.compress(b"{}")):
        (slides / name).write_bytes(text)
        assert read_cohort(write(slides, f"path,mask_path\na.svs,{name}\n")).faults == ()


def test_windows_paths(slides: Path) -> None:
    (slides / "c" / "mask.json").write_text("{}")
    text = "path,mask_path\nc\\a.svs,\nc\\none.svs,\na.svs,c\\mask.json\nD:\\scans\\a.svs,\n\\\\server\\a.svs,\n"
    cohort = read_cohort(write(slides, text))
    assert [row for row, _ in messages(cohort)] == [2, 3, 4, 5, 6]
    texts = [message for _, message in messages(cohort)]
    assert f"write / between folders, not \\: {slides}/c/a.svs exists" in texts[0]
    assert texts[1].endswith("no such file; write / between folders, not \\")
    assert f"{slides}/c/mask.json exists" in texts[2]
    assert "Windows" in texts[3] and "Windows" in texts[4]


@pytest.mark.parametrize(
    ("cell", "hint"),
    [
        ("~/a.svs", "~ and variables are not replaced: write the whole path"),
        ("$SLIDES/a.svs", "~ and variables are not replaced: write the whole path"),
        ("a%20b.svs", "write a path, not a URI: a b.svs"),
        ("file:/slides/a%20b.svs", "write a path, not a URI: /slides/a b.svs"),
    ],
)
def test_paths_of_shells_and_uris(tmp_path: Path, cell: str, hint: str) -> None:
    (tmp_path / "a b.svs").touch()
    (_, message), *_ = messages(read_cohort(write(tmp_path, f"path,slide_id\n{cell},x\n")))
    assert message.endswith(f"no such file; {hint}")


def test_a_url_as_the_cohort(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^https://host/a\.svs: .* in the column path of a CSV"):
        read_cohort("https://me:word@host/a.svs")


@pytest.mark.parametrize(("on_disk", "asked"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_another_unicode_form(tmp_path: Path, on_disk: str, asked: str) -> None:
    def name(form: str, text: str) -> str:
        return unicodedata.normalize(form, text)  # type: ignore[arg-type]

    folder = tmp_path / name(on_disk, "Für")
    folder.mkdir()
    (folder / name(on_disk, "Präparat.svs")).touch()
    (folder / name(on_disk, "ä.json")).write_text("{}")
    text = f"path,slide_id,mask_path\n{name(asked, 'Für/Präparat.svs')},a,{name(asked, 'Für/ä.json')}\n"
    texts = [message for _, message in messages(read_cohort(write(tmp_path, text)))]
    assert len(texts) == 2
    for message, file in zip(texts, ("Präparat.svs", "ä.json"), strict=True):
        assert f"{folder / name(on_disk, file)} exists" in message and f"({on_disk} on disk)" in message


def test_names_in_another_case(slides: Path) -> None:
    (_, message), *_ = messages(read_cohort(write(slides, "path,slide_id\nA.SVS,x\n")))
    assert f"{slides}/a.svs exists, which differs in upper and lower case" in message


def test_a_link_to_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "slide.svs").symlink_to("annex/slide.svs")
    assert "a link to annex/slide.svs, which does not exist" in near_name(tmp_path / "slide.svs", tmp_path)


def test_a_drive_is_not_a_scheme(tmp_path: Path) -> None:
    (fault,) = read_cohort(write(tmp_path, "path,mpp\nC://slides/a.svs,0.25\n")).faults
    assert "give a Windows path as this machine sees it" in fault.message

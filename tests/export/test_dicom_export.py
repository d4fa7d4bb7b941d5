"""DICOM annotations, read back by highdicom and by wsidicom, and the images that they refer to."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pandas as pd
import pydicom
import pytest
import shapely
from dicom_slide import write_dicom_slide
from export_tables import drawn, expected, exported, same_polygons, write_table
from PIL import Image
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.cohort.layout import Format, RunLayout
from hover_batch.export.read import NucleiTable
from hover_batch.taxonomy import CONSEP, Taxonomy


def as_stored(polygon: shapely.Polygon) -> shapely.Polygon:
    return shapely.transform(polygon, lambda points: points.astype(np.float32).astype(np.float64))


def test_highdicom_reads_all_groups_and_measurements(nuclei: NucleiTable, tmp_path: Path) -> None:
    path = exported(nuclei, Format.dicom, tmp_path)
    wanted = expected(nuclei)
    groups = highdicom.ann.annread(path).get_annotation_groups()
    assert [group.label for group in groups] == [c.name for c in CONSEP.nuclei if (wanted["type"] == c.name).any()]
    assert sum(group.number_of_annotations for group in groups) == nuclei.rows
    for group in groups:
        of_class = wanted[wanted["type"] == group.label]
        same_polygons([shapely.Polygon(ring) for ring in group.get_graphic_data("2D")], as_stored(of_class.geometry))
        names, values, units = group.get_measurements()
        assert [(name.meaning, unit.value) for name, unit in zip(names, units, strict=True)] == [
            ("Area", "um2"),
            ("Probability", "1"),
        ]
        np.testing.assert_array_equal(values, of_class[["area_um2", "type_prob"]])
        assert group.annotated_property_type.meaning == "Nucleus"
        (cell,) = group.primary_anatomic_structures
        code = (cell.scheme_designator, cell.value)
        assert code == (("SCT", "4212006") if group.label == "epithelial" else ("99HOVERBATCH", group.label))
        color = next(c.color for c in CONSEP.nuclei if c.name == group.label)
        shown = highdicom.color.CIELabColor.from_dicom_value(group.RecommendedDisplayCIELabValue).to_rgb()
        np.testing.assert_allclose(shown, color, atol=2)

    before = path.read_bytes()
    assert exported(nuclei, Format.dicom, tmp_path).read_bytes() == before, "an export is the same again"


def test_wsidicom_reads_the_same_polygons(nuclei: NucleiTable, tmp_path: Path) -> None:
    from wsidicom.graphical_annotations import AnnotationInstance

    (found,) = AnnotationInstance.open([exported(nuclei, Format.dicom, tmp_path)])
    wanted = expected(nuclei)
    for group in found.groups:
        of_class = wanted[wanted["type"] == group.label]
        polygons = [shapely.Polygon(annotation.geometry.to_coords()) for annotation in group.annotations]
        same_polygons(polygons, as_stored(of_class.geometry))
        areas = [annotation.measurements[0].value for annotation in group.annotations]
        np.testing.assert_array_equal(np.array(areas, np.float32), of_class.area_um2)


def test_long_and_accented_names_of_classes_are_kept(tmp_path: Path) -> None:
    name = "Plasmazellen und übrige Entzündungszellen"
    classes = (CONSEP.classes[0], *(replace(c, name=f"{name} {c.id}") for c in CONSEP.nuclei))
    nuclei = replace(write_table(tmp_path, *drawn()), taxonomy=Taxonomy("long", classes))
    groups = highdicom.ann.annread(exported(nuclei, Format.dicom, tmp_path)).get_annotation_groups()
    names = [f"{name} {c.id}" for c in CONSEP.nuclei]
    assert [group.label for group in groups] == names
    assert [group.primary_anatomic_structures[0].value for group in groups] == names


def test_other_tables_have_other_uids(tmp_path: Path) -> None:
    """Two files of one UID and different content would be taken for the same."""
    uids = set()
    for seed, nan in enumerate((False, True)):
        (tmp_path / str(seed)).mkdir()
        nuclei = write_table(tmp_path / str(seed), *drawn(), nan=nan)
        uids.add(pydicom.dcmread(exported(nuclei, Format.dicom, tmp_path)).SOPInstanceUID)
    assert len(uids) == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a white DICOM slide and a white picture, on which no nuclei are found."""
    folder = tmp_path_factory.mktemp("dicom-run")
    field = np.full((200, 300, 3), 245, np.uint8)
    write_dicom_slide(folder / "slide", [field, field[::2, ::2]], 0.25, "a")
    Image.fromarray(field).save(folder / "picture.png")
    (folder / "cohort.csv").write_text("path,slide_id,mpp\nslide,slide,\npicture.png,picture,0.25\n")
    result = CliRunner().invoke(app, ["segment", str(folder / "cohort.csv"), "-o", str(folder / "out")])
    assert result.exit_code == 0, result.output
    return folder


def references(folder: Path, slide_id: str) -> dict[str, Any]:
    """The UIDs of the study, series and image to which a slide's exported annotations refer."""
    result = CliRunner().invoke(app, ["export", str(folder / "out"), "--to", "dicom"])
    assert result.exit_code == 0, result.output
    found = pydicom.dcmread(RunLayout(folder / "out").slide(slide_id).exported(Format.dicom))
    (series,) = found.ReferencedSeriesSequence
    (image,) = series.ReferencedInstanceSequence
    assert image == found.ReferencedImageSequence[0]
    study, image_uid = found.StudyInstanceUID, image.ReferencedSOPInstanceUID
    return {"study": study, "series": series.SeriesInstanceUID, "image": image_uid, "patient": found.PatientID}


def test_annotations_refer_to_the_largest_level_of_the_slide(finished: Path) -> None:
    header = pydicom.dcmread(finished / "slide" / "level0.dcm", stop_before_pixels=True)
    assert references(finished, "slide") == {
        "study": header.StudyInstanceUID,
        "series": header.SeriesInstanceUID,
        "image": header.SOPInstanceUID,
        "patient": "nobody",
    }
    picture = references(finished, "picture")
    assert references(finished, "picture") == picture
    assert all(picture[name].startswith("2.25.") for name in ("study", "series", "image")) and not picture["patient"]


def test_headers_that_highdicom_rejects_are_reported(finished: Path, tmp_path: Path) -> None:
    from hover_batch.errors import SlideError

    shutil.copytree(finished / "slide", tmp_path / "slide")
    header = pydicom.dcmread(tmp_path / "slide" / "level0.dcm")
    header.PatientSex = "FEMALE"
    header.save_as(tmp_path / "slide" / "level0.dcm")
    table = RunLayout(finished / "out").slide("slide").nuclei_parquet
    with pytest.raises(SlideError, match=r"slide: the headers do not conform to DICOM.*correct them, or move"):
        exported(NucleiTable.open(table, tmp_path / "slide"), Format.dicom, tmp_path)
    assert not list(tmp_path.glob("*.dcm"))


@pytest.mark.parametrize("change", ["gone", "another slide"])
def test_without_the_slide_that_was_segmented_the_references_are_derived(
    finished: Path, tmp_path: Path, change: str
) -> None:
    real = references(finished, "slide")
    moved = finished / "moved"
    shutil.move(finished / "slide", moved)
    try:
        if change == "another slide":
            write_dicom_slide(finished / "slide", [np.full((200, 300, 3), 240, np.uint8)], 0.25, "b")
        derived = references(finished, "slide")
    finally:
        shutil.rmtree(finished / "slide", ignore_errors=True)
        shutil.move(moved, finished / "slide")
    assert all(derived[name] != real[name] for name in real)
    assert derived["image"].startswith("2.25.") and len(set(derived.values())) == 4


def test_a_class_map_s_names_get_standard_codes(tmp_path: Path) -> None:
    from hover_batch.export.dicom import _cell
    from hover_batch.taxonomy import MONUSAC, PANNUKE

    codes = {c.name: _cell(c) for c in (*PANNUKE.nuclei, *MONUSAC.nuclei)}
    found = pd.Series({name: code.value for name, code in codes.items() if code.scheme_designator == "SCT"})
    assert found.to_dict() == {
        "neoplastic": "252987004",
        "epithelial": "4212006",
        "lymphocyte": "56972008",
        "macrophage": "58986001",
    }
    assert codes["dead"].scheme_designator == "99HOVERBATCH" and codes["dead"].value == "dead"

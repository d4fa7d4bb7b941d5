"""Write DICOM Microscopy Bulk Simple Annotations (.ann.dcm): a group of polygons for each class, by highdicom.

Positions are pixels of the total pixel matrix of the slide's largest level, from its upper left corner, as in our
tables: (0, 0) is the corner of the first pixel. They are stored as float32. Each group holds the nuclei of a class in
the order of the table, with their area in µm² and the probability of their class. Classes without nuclei have no group.

The file refers to the image of the largest level in the slide's DICOM folder. For a slide of another format, or one
that is no longer there, it refers to an image whose UIDs are derived from the slide's fingerprint, and which no file
holds. All other UIDs are derived from the table, and dates are those of the source image, so that equal tables of the
same slide give equal bytes.

Codes: DICOM PS3.16 (CID 7150 and 8135 for the object, which is always a nucleus, 8136 for its area, DCM for the
probability). The kind of cell is the primary anatomic structure, as the NCI Imaging Data Commons codes nuclei. Its
SNOMED CT codes are those in use there (epithelial cell, lymphocyte, macrophage) and in FHIR profiles (tumor cell).
"""

from __future__ import annotations

import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from hover_batch.errors import SlideError
from hover_batch.export.read import NAMESPACE, NucleiTable
from hover_batch.files import is_dicom, replacing, sha256_file
from hover_batch.taxonomy import NucleusClass
from hover_batch.version import __version__

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.sr.coding import Code

_CELLS = {
    "epithelial": ("4212006", "Epithelial cell"),
    "lymphocyte": ("56972008", "Lymphocyte"),
    "macrophage": ("58986001", "Macrophage"),
    "neoplastic": ("252987004", "Tumor cell"),
}
"""SNOMED CT code and meaning of the kind of cell, by class."""
_PRIVATE = "99HOVERBATCH"
"""Coding scheme of all other classes, whose code is their name; DICOM reserves the prefix 99 for private schemes."""
_NO_DATE = "19700101"
"""Date where the source image has none, since the date is required and that of the export would change the bytes."""
_TEXT_LENGTH = 64
"""Maximum length of texts (LO)."""


def write_dicom(nuclei: NucleiTable, path: Path) -> None:
    """Write the table `nuclei` to `path` (.ann.dcm) as DICOM annotations. Equal tables give equal bytes.

    Each class that has nuclei is a group of polygons, in pixels of the slide's largest level, with areas in µm² and
    class probabilities. A table without nuclei gives a file without groups. All outlines are held in memory. An
    existing file is replaced only when all is written. Python's warnings are suppressed in the whole process while
    highdicom runs.

    OSError if the file cannot be written or the slide's DICOM folder cannot be listed, SlideError if the table is
    corrupted or highdicom rejects the headers of the slide.
    """
    from highdicom.ann import AnnotationCoordinateTypeValues, MicroscopyBulkSimpleAnnotations

    source = _source_image(nuclei)
    identity = f"dicom/{__version__}/{sha256_file(nuclei.path)}/{source.SOPInstanceUID}"
    groups = _groups(nuclei, identity)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the source's header, such as a patient's name of one word
            annotations = MicroscopyBulkSimpleAnnotations(
                source_images=[source],
                annotation_coordinate_type=AnnotationCoordinateTypeValues.SCOORD,
                annotation_groups=groups,
                series_instance_uid=_uid(f"{identity}/series"),
                series_number=1,
                sop_instance_uid=_uid(identity),
                instance_number=1,
                manufacturer="hover-batch",
                manufacturer_model_name="hover-batch",
                software_versions=__version__,
                device_serial_number=nuclei.model_sha256,
                content_label="NUCLEI",
                content_description=f"Nuclei of {nuclei.slide_id}"[:_TEXT_LENGTH],
                series_description="Nuclei",
                specific_character_set="ISO_IR 192",  # UTF-8, for the names of classes and patients
                content_date=source.get("ContentDate") or _NO_DATE,
                content_time=source.get("ContentTime") or "000000",
            )
    except (AttributeError, TypeError, ValueError) as error:
        raise SlideError(
            f"{nuclei.dicom}: the headers do not conform to DICOM, so that annotations cannot refer to them ({error}); "
            "correct them, or move the folder: without it, derived UIDs are written"
        ) from error
    # Times of the export, which are optional and would change the bytes. The last item describes highdicom itself.
    del annotations.InstanceCreationDate, annotations.InstanceCreationTime
    del annotations.ContributingEquipmentSequence[-1].ContributionDateTime
    with replacing(path) as temporary:
        annotations.save_as(temporary)


def _groups(nuclei: NucleiTable, identity: str) -> list[Any]:
    """Return an AnnotationGroup for each class that has nuclei."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.ann import AnnotationGroup, Measurements
    from highdicom.color import CIELabColor
    from pydicom.sr.codedict import codes

    rings: dict[int, list[Any]] = {c.id: [] for c in nuclei.taxonomy.classes}
    values: dict[int, list[Any]] = {c.id: [] for c in nuclei.taxonomy.classes}
    measured = {"area_um2": (codes.SCT.Area, codes.UCUM.SquareMicrometer)}
    measured["type_prob"] = (codes.DCM.Probability, codes.UCUM.NoUnits)
    names = list(measured)
    for batch in nuclei.batches([*names, "type_id", "geometry"]):
        types = batch["type_id"].to_numpy()
        exteriors = shapely.get_exterior_ring(nuclei.polygons(batch))
        table = np.column_stack([batch[name] for name in names])
        for kind in np.unique(types).tolist():
            of_kind = types == kind
            points, ring_of_point = shapely.get_coordinates(exteriors[of_kind], return_index=True)
            ends = np.flatnonzero(np.diff(ring_of_point, append=-1))
            # Without the last point of each ring, which repeats the first: DICOM closes polygons itself.
            open_rings = np.delete(points.astype(np.float32), ends, axis=0)
            rings[kind] += np.split(open_rings, (ends - np.arange(len(ends)))[:-1])
            values[kind].append(table[of_kind])
    algorithm = AlgorithmIdentificationSequence(
        nuclei.model[:_TEXT_LENGTH], codes.DCM.ArtificialIntelligence, nuclei.model_sha256, "hover-batch"
    )
    groups: list[Any] = []
    for c in nuclei.taxonomy.classes:
        if not rings[c.id]:
            continue
        columns = np.concatenate(values.pop(c.id)).T
        groups.append(
            AnnotationGroup(
                number=len(groups) + 1,
                uid=_uid(f"{identity}/{c.name}"),
                label=c.name[:_TEXT_LENGTH],
                annotated_property_category=codes.SCT.AnatomicalStructure,
                annotated_property_type=codes.SCT.Nucleus,
                graphic_type="POLYGON",
                graphic_data=rings.pop(c.id),
                algorithm_type="AUTOMATIC",
                algorithm_identification=algorithm,
                measurements=[
                    Measurements(name, column, unit)
                    for (name, unit), column in zip(measured.values(), columns, strict=True)
                ],
                primary_anatomic_structures=[_cell(c)],
                display_color=CIELabColor.from_rgb(*c.color),
            )
        )
    return groups


def _cell(c: NucleusClass) -> Code:
    """Return the code of the kind of cell that a class represents."""
    from pydicom.sr.coding import Code

    if c.name in _CELLS:
        value, meaning = _CELLS[c.name]
        return Code(value, "SCT", meaning)
    return Code(c.name, _PRIVATE, c.name[:_TEXT_LENGTH])


def _source_image(nuclei: NucleiTable) -> Dataset:
    """Return the header of the image that the annotations refer to, with all elements that highdicom needs."""
    from pydicom.dataset import Dataset
    from pydicom.uid import VLWholeSlideMicroscopyImageStorage

    source = Dataset()
    for name in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
        setattr(source, name, "")
    source.StudyDate = source.StudyTime = None
    source.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    source.Modality = "SM"
    source.ContainerIdentifier = nuclei.slide_id
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        setattr(source, name, _uid(f"slide/{nuclei.fingerprint}/{name}"))
    if (image := _image_in(nuclei)) is not None:
        source.update(image)
    return source


def _image_in(nuclei: NucleiTable) -> Dataset | None:
    """Return the header of the slide's largest level in its DICOM folder; None if there is no such image."""
    if nuclei.dicom is None:
        return None
    import pydicom
    from pydicom.errors import InvalidDicomError

    wanted = nuclei.level0.width, nuclei.level0.height
    for file in sorted(filter(is_dicom, nuclei.dicom.iterdir())):
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True)
        except (OSError, InvalidDicomError):
            continue
        size = header.get("TotalPixelMatrixColumns"), header.get("TotalPixelMatrixRows")
        if size == wanted and "VOLUME" in header.get("ImageType", ()):
            return header
    return None


def _uid(text: str) -> str:
    """Return a UID that depends on `text` only: 2.25 and a UUID as a number (DICOM PS3.5, annex B.2)."""
    return f"2.25.{uuid.uuid5(NAMESPACE, text).int}"

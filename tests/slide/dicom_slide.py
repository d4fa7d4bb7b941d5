"""Write a DICOM whole-slide image with one uncompressed instance per level, as a scanner would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian, VLWholeSlideMicroscopyImageStorage, generate_uid

TILE = 128


def write_dicom_slide(folder: Path, levels: Sequence[NDArray[np.uint8]], mpp: float | None, seed: str) -> None:
    """Write each level, RGB (h, w, 3), largest first. `mpp` in µm of the first; None leaves it out."""
    folder.mkdir()
    shared = {name: generate_uid(entropy_srcs=[seed, name]) for name in ("study", "series", "frame", "pyramid")}
    for number, level in enumerate(levels):
        _instance(level, mpp, levels[0].shape[1] / level.shape[1], number, shared, seed).save_as(
            folder / f"level{number}.dcm", enforce_file_format=True
        )


def _instance(
    level: NDArray[np.uint8], mpp: float | None, downsample: float, number: int, shared: dict[str, str], seed: str
) -> Dataset:
    height, width = level.shape[:2]
    rows, columns = -(-height // TILE), -(-width // TILE)
    padded = np.full((rows * TILE, columns * TILE, 3), 255, np.uint8)
    padded[:height, :width] = level
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = VLWholeSlideMicroscopyImageStorage
    ds.SOPInstanceUID = generate_uid(entropy_srcs=[seed, f"instance {number}"])
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID = shared["study"], shared["series"]
    ds.FrameOfReferenceUID, ds.PyramidUID = shared["frame"], shared["pyramid"]
    ds.Modality = "SM"
    ds.Manufacturer = "Synthetic"
    ds.PatientID = ds.PatientName = "nobody"
    ds.ContainerIdentifier = "slide"
    ds.ImageType = [
        "ORIGINAL" if number == 0 else "DERIVED",
        "PRIMARY",
        "VOLUME",
        "NONE" if number == 0 else "RESAMPLED",
    ]
    ds.DimensionOrganizationType = "TILED_FULL"
    ds.VolumetricProperties = "VOLUME"
    ds.SpecimenLabelInImage = "NO"
    ds.BurnedInAnnotation = "NO"
    ds.FocusMethod = "AUTO"
    ds.ExtendedDepthOfField = "NO"
    ds.InstanceNumber = number + 1
    ds.TotalPixelMatrixColumns, ds.TotalPixelMatrixRows = width, height
    ds.TotalPixelMatrixFocalPlanes = ds.NumberOfOpticalPaths = 1
    ds.Columns = ds.Rows = TILE
    ds.NumberOfFrames = rows * columns
    ds.SamplesPerPixel, ds.PlanarConfiguration, ds.PhotometricInterpretation = 3, 0, "RGB"
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit, ds.PixelRepresentation = 7, 0
    optics = Dataset()
    optics.OpticalPathIdentifier = "0"
    optics.ObjectiveLensPower = "40"
    ds.OpticalPathSequence = Items([optics])
    groups = Dataset()
    measures = Dataset()
    if mpp is not None:
        spacing = mpp * downsample / 1000
        measures.PixelSpacing = [f"{spacing:.8f}", f"{spacing:.8f}"]
        ds.ImagedVolumeWidth, ds.ImagedVolumeHeight = width * spacing, height * spacing
    measures.SliceThickness = "0.001"
    groups.PixelMeasuresSequence = Items([measures])
    ds.SharedFunctionalGroupsSequence = Items([groups])
    origin = Dataset()
    origin.XOffsetInSlideCoordinateSystem = origin.YOffsetInSlideCoordinateSystem = "0"
    ds.TotalPixelMatrixOriginSequence = Items([origin])
    ds.ImageOrientationSlide = ["0", "-1", "0", "-1", "0", "0"]
    tiles = padded.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2)
    ds.PixelData = np.ascontiguousarray(tiles).tobytes()
    return ds

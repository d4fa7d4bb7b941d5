"""Open the slide of a DICOM folder with wsidicom, after a check that the folder holds one slide."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hover_batch.errors import InputError, SlideError
from hover_batch.files import is_dicom
from hover_batch.formatting import listed

if TYPE_CHECKING:
    from pydicom import Dataset
    from wsidicom import WsiDicom

_SOURCE = "SOPInstanceUIDOfConcatenationSource"
_CONCATENATION = ("ConcatenationUID", "InConcatenationNumber", "InConcatenationTotalNumber", _SOURCE)
"""Attributes of an instance that was split into several files, a concatenation (DICOM PS3.3, C.7.6.16.2.2.4)."""
_NAMED = 3
"""Files of each slide that the message about several slides names."""


@contextmanager
def quiet_wsidicom() -> Iterator[None]:
    """Suppress wsidicom's messages on the root logger, and all Python warnings, while the block runs.

    wsidicom logs to the root logger, and would configure it if it had no handler; a temporary handler prevents this.
    Other libraries' messages, such as pydicom's, are lost only if the root logger has no other handler. `open_dicom`
    reports the faults that matter.

    Loggers and warning filters belong to the whole process: other threads are affected while the block runs, so it is
    not thread-safe.
    """
    root, null_handler = logging.getLogger(), logging.NullHandler()

    def not_from_wsidicom(entry: logging.LogRecord) -> bool:
        return "wsidicom" not in Path(entry.pathname).parts

    root.addHandler(null_handler)
    root.addFilter(not_from_wsidicom)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeFilter(not_from_wsidicom)
        root.removeHandler(null_handler)


@contextmanager
def open_dicom(folder: Path) -> Iterator[WsiDicom]:
    """Yield the slide of a DICOM folder, and close it when the block ends.

    wsidicom alone would open the largest slide, and silently skip the other slides and corrupted instances. While the
    block runs, messages of wsidicom and all Python warnings are suppressed in the whole process (see `quiet_wsidicom`),
    so it is not thread-safe.

    `folder`: folder with the DICOM instances of one slide.

    InputError if the folder holds several slides. SlideError if it holds no DICOM file, a file cannot be read as DICOM,
    the instances share no pixel spacing, parts of a concatenation are missing, two instances show the same level and
    plane, a level has several optical paths, or an instance is not supported by wsidicom. Other errors of wsidicom
    propagate.
    """
    slides, files = _slides_in(folder)
    if len(slides) > 1:
        raise InputError(f"{folder}: holds several slides; give each a folder of its own: {'; '.join(slides)}")
    from wsidicom import WsiDicom
    from wsidicom.errors import WsiDicomNoResolutionError, WsiDicomNotFoundError

    with quiet_wsidicom():
        try:
            wsi = WsiDicom.open(folder)
        except WsiDicomNoResolutionError as error:  # its text is empty, and mpp in the cohort would not help
            raise SlideError(
                f"{folder}: the DICOM instances have no pixel spacing that all frames share (PixelSpacing in "
                "SharedFunctionalGroupsSequence); add it, or convert the slide to TIFF"
            ) from error
        except (WsiDicomNotFoundError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not isinstance(error.__cause__, StopIteration):
                raise  # with StopIteration as its cause, wsidicom has left out all instances of a pyramid
            raise _unsupported(folder, files.values()) from error
        with wsi:
            if len(wsi.pyramids) > 1:
                raise InputError(
                    f"{folder}: holds several slides: {len(wsi.pyramids)} pyramids of one series; give each a folder "
                    "of its own"
                )
            opened = {
                str(data.uids.instance)
                for level in wsi.pyramids[0]
                for i in level.instances.values()
                for data in i.datasets
            }
            if skipped := [name for uid, name in files.items() if uid not in opened]:
                raise _unsupported(folder, skipped)
            for level in wsi.pyramids[0]:
                instances = level.instances.values()
                paths = {path for i in instances for path in i.optical_paths}
                if len(paths) > 1:  # wsidicom would read one of them
                    raise SlideError(
                        f"{folder}: holds pictures of several optical paths ({listed(sorted(paths))}), such as "
                        "different illuminations; keep only the files of one path in the folder"
                    )
                planes = [(z, path) for i in instances for z in i.focal_planes for path in i.optical_paths]
                if len(set(planes)) < len(planes):  # wsidicom would read one of them
                    raise SlideError(
                        f"{folder}: holds several pictures of {level.size.width} × {level.size.height} pixels in the "
                        "same focal plane; keep one of them in the folder"
                    )
            yield wsi


def _unsupported(folder: Path, names: Collection[str]) -> SlideError:
    """Return the SlideError to raise for files that wsidicom skips; it would read a coarser level instead."""
    return SlideError(
        f"{folder}: {listed(names)}: the encoding of the pixels or the header is not supported; convert the slide to "
        "an OME-TIFF"
    )


def _slides_in(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return a description of each slide whose pixels are in the folder, and the names of its files by SOPInstanceUID.

    Labels and overview images are ignored.

    SlideError if there is none, an instance cannot be read, or parts of a concatenation are missing.
    """
    files = sorted(filter(is_dicom, folder.iterdir()))
    if not files:
        raise SlideError(f"{folder}: holds no DICOM files; give a folder with the DICOM instances of one slide")
    import pydicom
    from pydicom.uid import VLWholeSlideMicroscopyImageStorage

    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    names_by_uid: dict[str, str] = {}
    concatenations: dict[str, list[Dataset]] = defaultdict(list)
    names = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")
    for file in files:
        try:
            with quiet_wsidicom():
                wanted = ["SOPClassUID", "SOPInstanceUID", "ImageType", "ContainerIdentifier", *names, *_CONCATENATION]
                header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted)
        except Exception as error:  # pydicom raises exceptions of many kinds for broken files
            reason = " ".join(str(error).split()) or type(error).__name__
            raise SlideError(f"{file}: cannot be read as DICOM: {reason}; copy it again, or remove it") from error
        if header.get("SOPClassUID") == VLWholeSlideMicroscopyImageStorage and "VOLUME" in header.get("ImageType", ()):
            identity = tuple(str(header.get(name, "")) for name in names)
            found[(str(header.get("ContainerIdentifier", "")), *identity)].append(file.name)
            names_by_uid[str(header.get("SOPInstanceUID"))] = file.name
            if "ConcatenationUID" in header:
                concatenations[str(header.ConcatenationUID)].append(header)
    for parts in concatenations.values():
        _check_concatenation(folder, parts)
    described = [
        f"{container or 'unnamed'}, series {series} ({', '.join(inside[:_NAMED])}{', …' * (len(inside) > _NAMED)})"
        for (container, _, series, _), inside in found.items()
    ]
    return described, names_by_uid


def _check_concatenation(folder: Path, parts: Sequence[Dataset]) -> None:
    """Raise SlideError if files of a concatenation are missing, or cannot be joined.

    wsidicom fills the tiles of missing files with white, and joins only files that name the instance that was split.

    `folder`: for the message. `parts`: headers of the files.
    """
    numbers = {int(part.get("InConcatenationNumber") or 0) for part in parts}
    # The total number is optional.
    total = max(*numbers, *(int(part.get("InConcatenationTotalNumber") or 0) for part in parts))
    if missing := [str(number) for number in range(1, total + 1) if number not in numbers]:
        raise SlideError(
            f"{folder}: a DICOM instance is split into {total} files, of which {listed(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing; copy the whole slide"
        )
    if len({part.get(_SOURCE) for part in parts} - {None}) != 1:
        raise SlideError(
            f"{folder}: a DICOM instance is split into {len(parts)} files that do not name the same source instance "
            f"({_SOURCE}), so that they cannot be joined; convert the slide to an OME-TIFF"
        )

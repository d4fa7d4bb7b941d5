"""Pixel sizes in µm: which values are plausible for a slide, and the messages for others."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import tifffile

from hover_batch.errors import InputError
from hover_batch.geometry import Mpp

PLAUSIBLE_MPP = (0.01, 20.0)
"""Range in µm that a slide scanner may write. Programs that do not know the pixel size write 72 dpi (353 µm)."""

USUAL_MPP = (0.1, 1.2)
"""Range in µm of nearly all brightfield scans; values outside of it give a warning."""

USUAL_MPP_TIMES_POWER = (4.0, 16.0)
"""Range of µm per pixel × objective power: about 10 on most scanners, 4.6 for 20× lenses with a finer camera."""

MPP_TOLERANCE = 0.05
"""Fraction by which the cohort's pixel size may differ from the file's, and x from y, without a warning."""

_MICROMETRES = {"nm": 1e-3, "µm": 1.0, "mm": 1e3, "cm": 1e4, "inch": 25_400.0}
_TIFF_UNITS = {2: "inch", 3: "cm", 4: "mm", 5: "µm"}
_IMAGEJ_UNITS = {"micron": "µm", "microns": "µm", "um": "µm", "\\u00B5m": "µm", "nm": "nm", "mm": "mm", "cm": "cm"}


@dataclass(frozen=True)
class StatedSize:
    """Pixel size that a file gives."""

    mpp: Mpp | None
    """Size of a pixel in µm; None if the file gives none, or one that cannot be used."""
    unusable: str = ""
    """Reason why the value in the file is not used; "" if there is none."""


def to_float(text: object) -> float | None:
    """Return `text`, such as the value of a tag, as a float; None if it is not a finite number."""
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def stated_size(x: object, y: object, source: str, unit: str = "µm") -> StatedSize:
    """Return the pixel size that a file gives, checked and converted to µm.

    If both values are None, the result has neither a size nor a reason. If they are not numbers, have an unknown unit,
    or are not plausible for a slide, it has no size, and `unusable` gives the reason.

    `x`, `y`: values along x and y, as numbers or text. `source`: where the values are, for messages, such as "its
    header". `unit`: unit of the values: nm, µm, mm, cm or inch.
    """
    if x is None and y is None:
        return StatedSize(None)
    across, down = to_float(x), to_float(y)
    statement = f"{source} says {x if x == y else f'{x} × {y}'} {unit} a pixel"
    if unit not in _MICROMETRES:
        return StatedSize(None, f"{statement}, an unknown unit")
    if across is None or down is None:
        return StatedSize(None, f"{statement}, which is not a pair of numbers")
    across, down = across * _MICROMETRES[unit], down * _MICROMETRES[unit]
    if fault := _fault_of(across, down):
        return StatedSize(None, f"{source} says {_words(across, down)} µm a pixel; {fault}")
    return StatedSize(Mpp(across, down))


def tiff_size(page: tifffile.TiffPage) -> StatedSize:
    """Return the pixel size that the resolution tags of a TIFF page give.

    XResolution and YResolution are in pixels per unit. The unit comes from ResolutionUnit, or else from the
    description, into which ImageJ writes one. If the tags are missing or 0, or are 1 × 1 without a unit, the result has
    neither a size nor a reason. If they have another value that cannot be used, it has no size, and `unusable` gives
    the reason.

    `page`: first page of the file.
    """
    x, y = (_per_unit(page, name) for name in ("XResolution", "YResolution"))
    if x is None or y is None:
        return StatedSize(None)
    unit = _TIFF_UNITS.get(int(page.tags.valueof("ResolutionUnit", default=1)))
    if unit is None and page.is_imagej:
        unit_line = re.search(r"^unit=(\S+)$", page.description, re.MULTILINE)
        unit = _IMAGEJ_UNITS.get(unit_line[1]) if unit_line else None
    if unit is None:  # writers that do not know the resolution give 1 × 1 without a unit
        return StatedSize(None, "" if x == y == 1 else f"its resolution of {_words(x, y)} has no unit")
    return stated_size(1 / x, 1 / y, f"its resolution of {_words(x, y)} per {unit}", unit)


def _words(x: float, y: float) -> str:
    return f"{x:.4g}" if x == y else f"{x:.4g} × {y:.4g}"


def _per_unit(page: tifffile.TiffPage, name: str) -> float | None:
    value = page.tags.valueof(name)
    return value[0] / value[1] if isinstance(value, tuple) and len(value) == 2 and value[0] and value[1] else None


def check_mpp(mpp: Mpp) -> None:
    """Raise InputError if `mpp`, a pixel size in µm that the cohort gives, lies outside of PLAUSIBLE_MPP."""
    if fault := _fault_of(mpp.x, mpp.y):
        raise InputError(f"mpp {mpp}: {fault}")


def disagreement(used: StatedSize, ignored: StatedSize, what: tuple[str, str]) -> tuple[str, ...]:
    """Return one warning if a file gives two pixel sizes that differ by more than MPP_TOLERANCE (5 %); else none.

    `used`: pixel size that is used, in µm. `ignored`: the other one. `what`: names of their two sources, in this order.
    """
    if used.mpp is None or ignored.mpp is None:
        return ()
    if max(abs(ignored.mpp.x / used.mpp.x - 1), abs(ignored.mpp.y / used.mpp.y - 1)) <= MPP_TOLERANCE:
        return ()
    return (
        f"{what[0]} gives {used.mpp} µm per pixel, but {what[1]} {ignored.mpp}; the former is used unless the cohort "
        "gives mpp; check which one is right",
    )


def warnings_of(mpp: Mpp, stated: Mpp | None, magnification: float | None) -> list[str]:
    """Return up to two warnings about the pixel size of a slide; an empty list if there is nothing to warn of.

    The first says that it differs from the file's by more than MPP_TOLERANCE (5 %). The second says that it lies
    outside of USUAL_MPP, is not square, or does not match the magnification (see USUAL_MPP_TIMES_POWER).

    `mpp`: pixel size in µm that is used. `stated`: pixel size in µm that the file gives; None if it gives none.
    `magnification`: objective's power; None if it is unknown.
    """
    messages = []
    if stated is not None:
        difference = max(abs(mpp.x / stated.x - 1), abs(mpp.y / stated.y - 1))
        if difference > MPP_TOLERANCE:
            messages.append(
                f"mpp {mpp} of the cohort is {difference:.0%} off the file's {stated}; the cohort's is used"
            )
    doubts = []
    if not all(USUAL_MPP[0] <= size <= USUAL_MPP[1] for size in (mpp.x, mpp.y)):
        doubts.append(f"slides have {USUAL_MPP[0]:g} to {USUAL_MPP[1]:g} µm a pixel as a rule")
    square = max(mpp.x, mpp.y) <= (1 + MPP_TOLERANCE) * min(mpp.x, mpp.y)
    if not square:
        doubts.append("pixels of slides are square as a rule")
    low, high = USUAL_MPP_TIMES_POWER
    if magnification is not None and not all(low <= size * magnification <= high for size in (mpp.x, mpp.y)):
        doubts.append(f"at a magnification of {magnification:g} about {10 / magnification:.2g} µm are expected")
    if doubts:
        columns = "column mpp" if square else "columns mpp_x and mpp_y (or in mpp, if both are equal)"
        messages.append(f"mpp {mpp}: {', and '.join(doubts)}; if it is wrong, give the right one in the {columns}")
    return messages


def _fault_of(x: float, y: float) -> str:
    """Return why a pixel size in µm is not plausible, with the unit that was probably meant; "" if it is."""
    low, high = PLAUSIBLE_MPP
    if low <= x <= high and low <= y <= high:
        return ""
    if min(x, y) <= 0:
        return "the true pixel size was not recorded"
    meant = [f"{x * _MICROMETRES[unit]:.4g} µm if it is in {unit}" for unit in ("nm", "mm", "cm")]
    usual = [USUAL_MPP[0] <= x * _MICROMETRES[unit] <= USUAL_MPP[1] for unit in ("nm", "mm", "cm")]
    hint = next((f" ({words})" for words, fits in zip(meant, usual, strict=True) if fits), "")
    return f"no slide has pixels of that many µm{hint}; {low:g} to {high:g} are possible"

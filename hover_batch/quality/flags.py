"""Flags of a slide: their names, conditions and sentences.

A flag depends only on the slide's measures (slide.json), the limits and the other slides of the cohort. Flags inform;
they never drop a slide.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, get_args

FlagName = Literal[
    "no_tissue",
    "mask",
    "no_nuclei",
    "few_nuclei",
    "many_nuclei",
    "pixel_size",
    "out_of_focus",
    "ink",
    "grey",
    "ihc",
    "stain",
    "low_seg_score",
    "low_type_prob",
]
FLAG_NAMES: tuple[FlagName, ...] = get_args(FlagName)
"""Names of all flags, in the order in which a slide's flags are listed."""

Limits = Mapping[str, tuple[float, float]]
"""Lowest and highest usual value of each measure."""

LIMITS: Limits = {
    "nuclei_per_mm2": (100, 30_000),
    "area_um2": (10.5, 100),
    "solidity": (0.91, 1.0),
    "sharpness": (0.75, math.inf),
    "h_od": (0.10, 1.40),
    "e_od": (0.0, 0.50),
    "seg_score": (0.65, 1.0),
    "type_prob": (0.45, 1.0),
}
"""Limits for models whose card has none: the range of public nuclei data sets at 0.25 µm, with a margin."""

MIN_COHORT = 8
"""Smallest number of slides for which slides are compared with their cohort."""
MAX_Z = 3.5
"""Robust z-score (Iglewicz and Hoaglin 1993) above which a slide is an outlier."""
_LOGARITHMIC = {"nuclei_per_mm2", "area_um2", "sharpness"}
"""Measures that differ between slides by a factor."""
_MIN_SPREAD = {"nuclei_per_mm2": 0.2, "area_um2": 0.12, "sharpness": 0.2, "seg_score": 0.04, "type_prob": 0.03}
"""Minimum standard deviation of a cohort, logarithmic for factors, since serial sections are nearly equal."""

_MIN_NUCLEI = 20
"""Minimum number of nuclei for the flag pixel_size."""
_ON_TISSUE_SHARE = 0.5
_BLURRED_SHARE = 0.3
_INK_SHARE = 0.005
_BROWN_SHARE = 0.15
_GREY_CHROMA = 12


@dataclass(frozen=True)
class Flag:
    """Warning about the quality of a slide."""

    name: FlagName
    """Name of the flag."""
    sentence: str
    """What is wrong, what to look at and what to do."""


@dataclass(frozen=True)
class _Slide:
    """Measures of a slide, the limits of its model, and the bounds that the cohort sets."""

    measures: Mapping[str, Any]
    limits: Limits
    cohort: Limits

    def __getitem__(self, name: str) -> Any:
        """Return a measure; None if the run did not take it."""
        return self.measures.get(name)

    def below(self, name: str, bounds: Limits) -> bool:
        return self[name] is not None and name in bounds and self[name] < bounds[name][0]

    def above(self, name: str, bounds: Limits) -> bool:
        return self[name] is not None and name in bounds and self[name] > bounds[name][1]

    def outside(self, name: str, bounds: Limits) -> bool:
        return self.below(name, bounds) or self.above(name, bounds)

    @property
    def nearest(self) -> Limits:
        """Bounds from the cohort if it has them, else the limits."""
        return {**self.limits, **self.cohort}

    @property
    def out_of_focus(self) -> float:
        """Share of the sampled fields whose nuclei are blurred, in themselves or compared with the cohort."""
        return _share_below(self["sharpness"], max(b["sharpness"][0] for b in (self.limits, self.nearest))) or 0.0

    @property
    def implausible_area(self) -> bool:
        """Whether the median nucleus is too small or too large, for any slide or for this cohort."""
        return self.outside("area_um2", self.limits) or self.outside("area_um2", self.cohort)

    @property
    def wrong_pixel_size(self) -> str:
        """Sentences that say why the pixel size may be wrong."""
        if self.implausible_area:
            return (
                f"The median nucleus has {self['area_um2']:.3g} µm², which is implausible. The pixel size is probably "
                f"wrong: {self.mpp_factor:.2g} times the present one would fit."
            )
        return (
            f"The outlines are irregular (median solidity {self['solidity']:.2f}). Look at overlay.jpg: if they "
            "surround groups of nuclei, the pixel size is probably too small, often by a factor of about 4."
        )

    @property
    def mpp_factor(self) -> float:
        """Factor by which the pixel size must be multiplied for nuclei of the usual size.

        It is a power of two if one is near, since a wrong magnification is the usual cause.
        """
        usual = self.cohort.get("area_um2") or self.limits["area_um2"]
        ratio = math.sqrt(math.sqrt(usual[0] * usual[1]) / self["area_um2"])
        power = 2.0 ** round(math.log2(ratio))
        return power if power != 1 and 0.7 < ratio / power < 1.42 else ratio


@dataclass(frozen=True)
class _Rule:
    """Condition and text of a flag. `sentence` is formatted with the slide as `s`."""

    name: FlagName
    applies: Callable[[_Slide], bool]
    sentence: str


RULES = (
    _Rule(
        "no_tissue",
        lambda s: s["tissue_mm2"] == 0,
        "No tissue was found. Look at thumbnail.jpg: if there is tissue, run the slide with --tissue all or give its "
        "outline as mask_path.",
    ),
    _Rule(
        "mask",
        lambda s: s["mask_on_tissue"] is not None and s["mask_on_tissue"] < _ON_TISSUE_SHARE,
        "Only {s[mask_on_tissue]:.0%} of the mask lies on stained tissue. Look at thumbnail.jpg: check that the mask "
        "was drawn on this slide, is neither flipped nor inverted, and counts in level-0 pixels, not in µm or pixels "
        "of another level.",
    ),
    _Rule(
        "no_nuclei",
        lambda s: s["nuclei"] == 0 and s["tissue_mm2"] != 0,
        "No nucleus was found in the tissue. Look at overlay.jpg: check that the slide is H&E, in focus, and has the "
        "right pixel size.",
    ),
    _Rule(
        "few_nuclei",
        lambda s: bool(s["nuclei"]) and s.below("nuclei_per_mm2", s.nearest),
        "Only {s[nuclei_per_mm2]:,.0f} nuclei per mm² of tissue; at least {s.nearest[nuclei_per_mm2][0]:,.0f} are "
        "expected here. Look at overlay.jpg for missed nuclei and at the tissue outline in thumbnail.jpg; check the "
        "pixel size and the focus.",
    ),
    _Rule(
        "many_nuclei",
        lambda s: s.above("nuclei_per_mm2", s.nearest),
        "{s[nuclei_per_mm2]:,.0f} nuclei per mm² of tissue; at most {s.nearest[nuclei_per_mm2][1]:,.0f} are expected "
        "here. Look at overlay.jpg for objects that are not nuclei; check the pixel size and the tissue outline.",
    ),
    _Rule(
        "pixel_size",
        lambda s: s.implausible_area or s.below("solidity", s.limits),
        "{s.wrong_pixel_size} Check the magnification of the scan, then give the right mpp in the cohort CSV.",
    ),
    _Rule(
        "out_of_focus",
        lambda s: s.out_of_focus >= _BLURRED_SHARE,
        "The nuclei are blurred in {s.out_of_focus:.0%} of the sampled fields. Look at overlay.jpg; scan the slide "
        "again, or exclude the blurred part with mask_path. Nuclei that look large and smooth have a wrong pixel size.",
    ),
    _Rule(
        "ink",
        lambda s: (s["ink"] or 0) >= _INK_SHARE,
        "{s[ink]:.1%} of the picture looks like pen or ink. Look at thumbnail.jpg: if the tissue outline contains ink, "
        "give the tissue as mask_path.",
    ),
    _Rule(
        "grey",
        lambda s: s["chroma"] is not None and s["chroma"] < _GREY_CHROMA and (s["dark"] or 0) > 0.01,
        "The picture has no colour. Look at thumbnail.jpg: the model needs H&E in colour; export it again as RGB.",
    ),
    _Rule(
        "ihc",
        lambda s: (s["brown"] or 0) >= _BROWN_SHARE,
        "{s[brown]:.0%} of the stained area is brown, as in immunohistochemistry (DAB). Look at thumbnail.jpg: the "
        "model knows H&E only; remove slides with other stains from the cohort.",
    ),
    _Rule(
        "stain",
        lambda s: None not in (s["h_od"], s["e_od"]) and (s.outside("h_od", s.limits) or s.outside("e_od", s.limits)),
        "The stain of the nuclei (optical density: hematoxylin {s[h_od]:.2f}, eosin {s[e_od]:.2f}) is unlike that of "
        "the training images. Look at overlay.jpg for missed nuclei before you use the counts.",
    ),
    _Rule(
        "low_seg_score",
        lambda s: s.below("seg_score", s.nearest),
        "The mean seg_score is {s[seg_score]:.2f}; at least {s.nearest[seg_score][0]:.2f} is expected here. Look at "
        "the outlines in overlay.jpg before you use the counts.",
    ),
    _Rule(
        "low_type_prob",
        lambda s: s.below("type_prob", s.nearest),
        "The mean type_prob is {s[type_prob]:.2f}; at least {s.nearest[type_prob][0]:.2f} is expected here. Check the "
        "classes in overlay.jpg before you count them.",
    ),
)


def flag_slides(slides: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Flag, ...]]:
    """Return the flags of each slide of a cohort, by slide_id; an empty tuple for a slide without flags.

    Measures are compared with the limits of the model's card, which slide.json holds, or with LIMITS for measures that
    the card lacks. The density and area of the nuclei, the sharpness, seg_score and type_prob of a slide are also
    compared with the median of the cohort, if at least MIN_COHORT slides have them. Measures that are missing in
    slide.json, because an older version wrote it, give no flags.

    `slides`: content of slide.json by slide_id.
    """
    measures = {slide_id: _measures(slide) for slide_id, slide in slides.items()}
    cohort = _cohort_bounds(list(measures.values()))
    flags = {}
    for slide_id, values in measures.items():
        slide = _Slide(values, _limits(slides[slide_id]), cohort)
        flags[slide_id] = tuple(Flag(rule.name, rule.sentence.format(s=slide)) for rule in RULES if rule.applies(slide))
    return flags


def summary_columns(slide: Mapping[str, Any], flags: Sequence[Flag]) -> dict[str, Any]:
    """Return the quality columns of one slide in the summary, values by column; None for what was not measured.

    The columns are h_od_mean, e_od_mean, seg_score_mean, type_prob_mean, out_of_focus, ink and flags. `out_of_focus` is
    the share (0 to 1) of the sampled fields whose sharpness is below the model's limit; the cohort is not considered.
    `flags` has the names of the flags, separated by semicolons.

    `slide`: content of slide.json. `flags`: flags of the slide.
    """
    measures = _measures(slide)
    columns = {f"{name}_mean": measures.get(name) for name in ("h_od", "e_od", "seg_score", "type_prob")}
    return columns | {
        "out_of_focus": _share_below(measures.get("sharpness"), _limits(slide)["sharpness"][0]),
        "ink": measures.get("ink"),
        "flags": ";".join(flag.name for flag in flags),
    }


def _limits(slide: Mapping[str, Any]) -> Limits:
    """Return the card's limits, with the defaults for measures that it lacks.

    The card can only narrow the limits of the area, since one small training image may have smaller nuclei than the
    median of any slide.
    """
    limits = {**LIMITS, **slide.get("limits", {})}
    low, high = LIMITS["area_um2"]
    return limits | {"area_um2": (max(low, limits["area_um2"][0]), min(high, limits["area_um2"][1]))}


def _measures(slide: Mapping[str, Any]) -> dict[str, Any]:
    """Return the measures in a slide.json: those of `quality`, and counts from the summary."""
    summary = slide.get("summary", {})
    counted = {name: summary[name] for name in ("nuclei", "tissue_mm2", "nuclei_per_mm2") if name in summary}
    medians = {}
    if counted.get("nuclei", 0) >= _MIN_NUCLEI:
        medians = {name: value for name in ("area_um2", "solidity") if (value := summary.get(f"{name}_p50"))}
    return {**counted, **medians, **slide.get("quality", {})}


def _share_below(values: Sequence[float] | None, limit: float) -> float | None:
    """Return the share of the values below the limit; None if there are no values."""
    return sum(value < limit for value in values) / len(values) if values else None


def _cohort_bounds(slides: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return the bounds beyond which a slide is an outlier, for each measure that at least MIN_COHORT slides have.

    They are median ± MAX_Z robust standard deviations.
    """
    bounds = {}
    for name, least in _MIN_SPREAD.items():
        log = name in _LOGARITHMIC
        values = [median(v) if isinstance(v, list) else v for slide in slides if (v := slide.get(name))]
        if len(values) >= MIN_COHORT:
            scaled = [math.log(value) if log else value for value in values]
            middle = median(scaled)
            # 1.4826 × MAD estimates the standard deviation of a normal distribution.
            spread = max(least, 1.4826 * median(abs(value - middle) for value in scaled))
            low, high = middle - MAX_Z * spread, middle + MAX_Z * spread
            bounds[name] = (math.exp(low), math.exp(high)) if log else (low, high)
    return bounds


def counts_of(flags: Mapping[str, Sequence[Flag]]) -> dict[FlagName, int]:
    """Return the number of slides with each flag, by name in the order of FLAG_NAMES, without flags that no slide has.

    `flags`: flags of each slide, by slide_id.
    """
    counts = Counter(flag.name for slide_flags in flags.values() for flag in slide_flags)
    return {name: counts[name] for name in FLAG_NAMES if counts[name]}

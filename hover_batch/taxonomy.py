"""Nucleus classes with id, name and colour. Each model has one taxonomy; id 0 is always the background.

Sources: CoNSeP's merged classes as HoVerNet uses them (Graham et al. 2019, section 4.1: malignant and healthy
epithelium merged; fibroblast, muscle and endothelial merged to spindle-shaped); PanNuke's five (Gamper et al. 2020);
MoNuSAC's four (Verma et al. 2021).

CoNSeP's order is that of the annotations' codes, which hover_net's training code merges in place (1 other, 2
inflammatory, 3 + 4 → 3, 5 + 6 + 7 → 4): 1 miscellaneous, 2 inflammatory, 3 epithelial, 4 spindle. The authors'
inference code uses the same names. tiatoolbox 2.1 names the classes of the same weights (hovernet_original-consep)
epithelial, inflammatory, spindle, miscellaneous; this project follows the training code instead. For other data sets
both agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hover_batch.errors import InputError

Rgb = tuple[int, int, int]
RESERVED_NAMES = ("background", "nuclei")
"""Reserved names: background is class 0, and a summary's nuclei_per_mm2 counts all classes together."""
ESTIMATE = "estimated_"
"""Beginning of the columns of estimates in a summary; the names of classes must not begin with it."""
MAX_CLASSES = 256
"""Maximum number of classes in a taxonomy, background included, since an id is one byte in the tables."""


@dataclass(frozen=True)
class NucleusClass:
    """Class of nuclei, or the background."""

    id: int
    """Index of the class in its taxonomy and among the type probabilities; 0 is the background."""
    name: str
    """Name in tables and pictures."""
    color: Rgb
    """Red, green and blue, each 0 to 255."""


@dataclass(frozen=True)
class Taxonomy:
    """Classes of one model in the order of their ids, background first.

    ValueError unless ids are 0, 1, 2, … and there are 2 to MAX_CLASSES classes.
    """

    name: str
    """Name of the taxonomy."""
    classes: tuple[NucleusClass, ...]
    """Classes in the order of their ids, background first."""

    def __post_init__(self) -> None:
        if [c.id for c in self.classes] != list(range(len(self.classes))):
            raise ValueError(f"taxonomy {self.name}: class ids must be 0, 1, 2, … in order")
        if len(self.classes) < 2 or len(self.classes) > MAX_CLASSES:
            raise ValueError(f"taxonomy {self.name}: needs the background and 1 to 255 classes of nuclei")

    @property
    def nuclei(self) -> tuple[NucleusClass, ...]:
        """Classes without the background."""
        return self.classes[1:]

    def merged(self, class_map: Mapping[str, Any]) -> tuple[Taxonomy, tuple[int, ...]]:
        """Apply a class map. Return the new taxonomy, and the new id of each class in the order of the old ids.

        New classes are ordered by the lowest id that each replaces; the order in the map does not matter. An empty map
        changes nothing.

        `class_map`: for each new name, the list of the classes that it replaces, or a mapping with this list as
        `classes` and, optionally, `color` as [red, green, blue], each 0 to 255. The default is the colour of the first
        class in the list.

        InputError if the map is malformed, if a class other than the background is not named exactly once, or if new
        names differ in upper and lower case only.
        """
        if not class_map:
            return self, tuple(c.id for c in self.classes)
        by_name = {c.name: c for c in self.nuclei}
        merged: list[tuple[int, str, Rgb]] = []  # lowest old id, new name, colour
        new_name_of: dict[str, str] = {}
        for name, value in class_map.items():
            members, color = _members_and_color(name, value)
            for member in members:
                if member not in by_name:
                    raise InputError(
                        f"class map: {name}: {member} is not a class of the model; it has {_list(by_name)}"
                    )
                if member in new_name_of:
                    raise InputError(f"class map: {member} is named twice, in {new_name_of[member]} and in {name}")
                new_name_of[member] = name
            lowest_id = min(by_name[member].id for member in members)
            merged.append((lowest_id, name, color or by_name[members[0]].color))
        if twins := _twins(class_map):
            raise InputError(f"class map: {_list(twins)} differ in upper and lower case only; rename one of them")
        if missing := [name for name in by_name if name not in new_name_of]:
            raise InputError(f"class map: {_list(missing)} not mapped; name each class once: {_list(by_name)}")
        background = self.classes[0]
        nuclei = [NucleusClass(i, name, color) for i, (_, name, color) in enumerate(sorted(merged), start=1)]
        new_ids = {c.name: c.id for c in nuclei}
        id_map = (0, *(new_ids[new_name_of[name]] for name in by_name))
        return Taxonomy(f"{self.name}, mapped", (background, *nuclei)), id_map

    def to_json(self) -> dict[str, object]:
        """Return the taxonomy as JSON values, for model cards and store attributes; the inverse of `from_json`.

        The keys are `name` and `classes`, a list of objects with `id`, `name` and `color` ([red, green, blue]).
        """
        return {
            "name": self.name,
            "classes": [{"id": c.id, "name": c.name, "color": list(c.color)} for c in self.classes],
        }

    @classmethod
    def from_json(cls, data: Any) -> Taxonomy:
        """Return the taxonomy whose `to_json` returned `data`, which may come from an untrusted file.

        KeyError, TypeError or ValueError if it is malformed.
        """
        name, entries = data["name"], data["classes"]
        has_name = isinstance(name, str) and name.isprintable()
        if not has_name or not isinstance(entries, list) or len(entries) > MAX_CLASSES:
            raise ValueError(f"taxonomy: needs a name and a list of at most {MAX_CLASSES} classes")
        classes = []
        for entry in entries:
            class_id, label, color = entry["id"], entry["name"], entry["color"]
            if type(class_id) is not int or not isinstance(label, str) or not label or not label.isprintable():
                raise ValueError(f"taxonomy: a class has the id {class_id!r:.40} and the name {label!r:.40}")
            levels = [c for c in color if type(c) is int and 0 <= c <= 255] if isinstance(color, list) else []
            if len(levels) != 3 or len(color) != 3:
                raise ValueError(f"taxonomy: class {label:.40} has the colour {color!r:.40}")
            classes.append(NucleusClass(class_id, label, (levels[0], levels[1], levels[2])))
        if any(c.name.casefold().startswith(ESTIMATE) for c in classes):
            raise ValueError(f"taxonomy: names that begin with {ESTIMATE} are reserved for estimates")
        if twins := _twins([*(c.name for c in classes), "nuclei"]):
            raise ValueError(
                f"taxonomy: the names {_list(twins)} are the same, or differ in upper and lower case only (nuclei is "
                "reserved)"
            )
        return cls(name, tuple(classes))


def _twins(names: Iterable[str]) -> list[str]:
    """Return two names that are equal up to upper and lower case, as columns in SQL are; [] if there are none."""
    seen: dict[str, str] = {}
    for name in names:
        if name.casefold() in seen:
            return [seen[name.casefold()], name]
        seen[name.casefold()] = name
    return []


def _members_and_color(name: str, value: Any) -> tuple[list[str], Rgb | None]:
    """Return the classes and the colour in one entry of a class map."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.casefold() in RESERVED_NAMES:
        raise InputError(
            f"class map: {name!r} cannot name a class; use letters, digits, `.`, `_`, `-`, and neither of "
            f"{_list(RESERVED_NAMES)}"
        )
    if name.casefold().startswith(ESTIMATE):
        raise InputError(f"class map: {name!r} cannot name a class, since {ESTIMATE} begins the columns of estimates")
    table = value if isinstance(value, Mapping) else {"classes": value}
    members, color = table.get("classes"), table.get("color")
    if (
        not isinstance(members, list)
        or not members
        or not all(isinstance(member, str) for member in members)
        or not table.keys() <= {"classes", "color"}
    ):
        raise InputError(
            f'class map: {name}: write {name} = ["class", …], '
            f'or {name} = {{ classes = ["class", …], color = [red, green, blue] }}'
        )
    if color is None:
        return members, None
    if not isinstance(color, list) or len(color) != 3 or not all(type(c) is int and 0 <= c <= 255 for c in color):
        raise InputError(f"class map: {name}: color {color!r} must be [r, g, b], each 0 to 255")
    red, green, blue = color
    return members, (red, green, blue)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _taxonomy(name: str, *classes: tuple[str, Rgb]) -> Taxonomy:
    listed = (("background", (255, 255, 255)), *classes)
    return Taxonomy(name, tuple(NucleusClass(i, n, c) for i, (n, c) in enumerate(listed)))


CONSEP = _taxonomy(
    "consep-merged",
    ("miscellaneous", (230, 190, 0)),
    ("inflammatory", (0, 160, 60)),
    ("epithelial", (220, 30, 40)),
    ("spindle", (30, 90, 230)),
)

PANNUKE = _taxonomy(
    "pannuke",
    ("neoplastic", (220, 30, 40)),
    ("inflammatory", (0, 160, 60)),
    ("connective", (30, 90, 230)),
    ("dead", (230, 190, 0)),
    ("epithelial", (255, 130, 20)),
)

MONUSAC = _taxonomy(
    "monusac",
    ("epithelial", (220, 30, 40)),
    ("lymphocyte", (0, 160, 60)),
    ("macrophage", (230, 190, 0)),
    ("neutrophil", (30, 90, 230)),
)

NUCLEI = _taxonomy("nuclei", ("nucleus", (0, 160, 60)))
"""Taxonomy of networks without a type branch."""

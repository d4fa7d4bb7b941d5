"""Nucleus classes: id, name, colour. One taxonomy a model; id 0 is always the background.

Sources: CoNSeP's merged classes as HoVerNet uses them (Graham et al. 2019, section 4.1: malignant and healthy
epithelium merged, fibroblast, muscle and endothelial merged to spindle-shaped); PanNuke's five (Gamper et al. 2020);
MoNuSAC's four (Verma et al. 2021).

CoNSeP's order is that of the annotations' codes, which hover_net's training code merges in place (1 other, 2
inflammatory, 3 + 4 → 3, 5 + 6 + 7 → 4): 1 miscellaneous, 2 inflammatory, 3 epithelial, 4 spindle; its authors'
inference code names them so, too. tiatoolbox 2.1 lists the same weights (hovernet_original-consep) as epithelial,
inflammatory, spindle, miscellaneous; what was trained decides, so that list is not followed here. Elsewhere they agree.
"""

from __future__ import annotations

from dataclasses import dataclass

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class NucleusClass:
    """One class of nuclei. `id` is the channel among the type probabilities, 0 being the background."""

    id: int
    name: str
    color: Rgb


@dataclass(frozen=True)
class Taxonomy:
    """The classes of one model in the order of their ids, background first."""

    name: str
    classes: tuple[NucleusClass, ...]

    def __post_init__(self) -> None:
        if [c.id for c in self.classes] != list(range(len(self.classes))):
            raise ValueError(f"taxonomy {self.name}: class ids must be 0, 1, 2, … in order")
        if len(self.classes) < 2 or len(self.classes) > 256:
            raise ValueError(f"taxonomy {self.name}: needs the background and 1 to 255 classes of nuclei")

    @property
    def nuclei(self) -> tuple[NucleusClass, ...]:
        """The classes without the background."""
        return self.classes[1:]

    def to_json(self) -> dict[str, object]:
        """For model cards and store attributes; `from_json` reads it back."""
        return {
            "name": self.name,
            "classes": [{"id": c.id, "name": c.name, "color": list(c.color)} for c in self.classes],
        }

    @classmethod
    def from_json(cls, data: dict[str, object]) -> Taxonomy:
        classes = data["classes"]
        assert isinstance(classes, list)
        return cls(
            str(data["name"]),
            tuple(NucleusClass(int(c["id"]), str(c["name"]), tuple(c["color"])) for c in classes),
        )


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
"""Of networks without a type branch."""

"""Model card as README.md of a Hugging Face repository: YAML metadata and Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hover_batch.model.card import Card
from hover_batch.model.package import Package

_SCORES = {
    "pq": "PQ",
    "dq": "DQ",
    "sq": "SQ",
    "aji": "AJI",
    "dice": "Dice",
    "f_d": "F1 of detections",
    "mpq": "mPQ",
    "bpq": "bPQ",
}
"""Scores with one number for all classes, and their names."""
_LICENCES = {"CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0", "CC BY 4.0": "cc-by-4.0", "Apache-2.0": "apache-2.0", "MIT": "mit"}
"""Prefix of a card's licence → identifier of Hugging Face."""


def hub_card(package: Package) -> str:
    """Return the text of a package's README.md for Hugging Face: YAML metadata, then Markdown.

    All values come from the package's card, except the hash of the file. In the metadata, the licence is CC BY-NC-SA
    4.0, CC BY 4.0, Apache-2.0 or MIT if the card's licence begins with this name; otherwise it is `other`.

    `package`: package on disk.
    """
    from huggingface_hub import EvalResult, ModelCardData

    card = package.card
    scores = list(_scores(card))
    licence_ids = [code for words, code in _LICENCES.items() if re.match(rf"{re.escape(words)}\b", card.licence)]
    data = ModelCardData(
        model_name=_flat(card.name),
        license=licence_ids[0] if licence_ids else "other",
        license_name=None if licence_ids else "see-below",
        library_name="hover-batch",
        pipeline_tag="image-segmentation",
        tags=["computational-pathology", "nucleus-segmentation", "histology", card.architecture],
        datasets=sorted(map(_flat, nested(card.training, "data", "train"))) or None,
        metrics=sorted({metric for _, _, metric, _ in scores}) or None,
        eval_results=[
            EvalResult(
                task_type="image-segmentation",
                dataset_type=_flat(source),
                dataset_name=_flat(source),
                dataset_split=split,
                metric_type=metric,
                metric_name=_SCORES[metric],
                metric_value=value,
            )
            for split, source, metric, value in scores
        ]
        or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(package, scores)}"


def _body(package: Package, scores: list[tuple[str, str, str, float]]) -> str:
    card = package.card
    seen = card.training.get("seen") or listed_entries(nested(card.training, "data", "train")) or "not recorded"
    rows = {
        "architecture": f"{card.architecture} {card.encoder}".rstrip(),
        "pixels": f"{card.mpp:g} µm; tiles of {card.tile_in} pixels, of which {card.tile_out} are kept",
        "input": card.input_scaling,
        "classes": ", ".join(c.name for c in card.taxonomy.nuclei),
        "trained on": seen,
        "started from": earlier_data(card),
        "note": card.training.get("note"),
        "sha256 of the file": package.sha256,
        "sha256 of the weights": card.weights_sha256,
    }
    lines = [
        f"# {_text(card.name)}",
        "",
        "Finds, outlines and classifies nuclei in H&E whole-slide images. For research only: not a medical device.",
        "",
        f"**Licence**: {_text(card.licence)}",
        "",
        "```sh",
        "hover-batch segment cohort.csv -o out/ --model FILE.safetensors",
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_text(value)} |" for name, value in rows.items() if value),
        "",
    ]
    if scores:
        lines += [
            "| split | data | score | value |",
            "|---|---|---|---|",
            *(
                f"| {_text(split)} | {_text(source)} | {_SCORES[m]} | {value:.4f} |"
                for split, source, m, value in scores
            ),
            "",
        ]
    return "\n".join(lines)


def _scores(card: Card) -> Iterator[tuple[str, str, str, float]]:
    """Yield (split, source, score, value) of the finite numbers in the card."""
    for split in ("test", "val"):
        for source, scores in nested(card.metrics, split).items():
            for metric in _SCORES if isinstance(scores, Mapping) else ():
                value = scores.get(metric)
                if type(value) in (int, float) and math.isfinite(value):
                    yield split, source, metric, float(value)


def nested(values: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """Return the mapping inside `values` that the keys `path` lead to, one key per level; empty if there is none."""
    for name in path:
        inner = values.get(name)
        if not isinstance(inner, Mapping):
            return {}
        values = inner
    return values


def earlier_data(card: Card) -> str:
    """Return the data that the initial weights of the model were trained on, as a clause; empty if not others."""
    before = listed_entries(nested(card.training, "before", "data", "train"))
    return f"weights trained on {before}" if before != listed_entries(nested(card.training, "data", "train")) else ""


def listed_entries(values: Mapping[str, Any]) -> str:
    """Return the entries of `values` as one line, such as `a 1, b 2`.

    An entry `a: {"images": 3, …}` is written as `a 3 images`.
    """
    return ", ".join(
        f"{k} {v['images']} images" if isinstance(v, Mapping) and "images" in v else f"{k} {v}"
        for k, v in values.items()
    )


def _text(value: object) -> str:
    """Escape Markdown and collapse white space, for one line or table cell."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", _flat(value))


def _flat(value: object) -> str:
    """Collapse white space to one line, since a line `---` would end the YAML."""
    return re.sub(r"\s+", " ", str(value))

"""Tests of the model card for a hub: its YAML front matter agrees with the package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.commands.models import describe
from hover_batch.model.hub_card import hub_card
from hover_batch.model.package import Package, find_package

STARTER = find_package("starter")


def front_matter(text: str) -> dict[str, object]:
    before, head, _ = text.split("---\n", 2)
    assert before == ""
    data = yaml.safe_load(head)
    assert isinstance(data, dict)
    return data


def test_the_starters_card() -> None:
    result = CliRunner().invoke(app, ["models", "card", "starter"])
    assert result.exit_code == 0
    data = front_matter(result.stdout)
    assert data["license"] == "cc-by-nc-sa-4.0" and data["datasets"] == sorted(STARTER.card.training["data"]["train"])
    (index,) = data["model-index"]  # type: ignore[misc]
    scores = {
        (found["dataset"]["split"], found["dataset"]["name"], metric["type"]): metric["value"]
        for found in index["results"]  # type: ignore[index]
        for metric in found["metrics"]
    }
    held = STARTER.card.metrics
    assert scores["test", "consep", "pq"] == held["test"]["consep"]["pq"]
    assert scores["val", "monuseg", "f_d"] == held["val"]["monuseg"]["f_d"]
    for said in (STARTER.card.licence, STARTER.sha256, "monuseg 25 images", "For research only"):
        assert said in result.stdout


def test_huggingface_reads_the_card(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    (tmp_path / "README.md").write_text(hub_card(STARTER))
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.license == "cc-by-nc-sa-4.0" and read.data.eval_results


def test_the_data_of_the_initial_weights_are_named() -> None:
    training = {"data": {"train": {"ours": {"images": 2}}}, "before": STARTER.card.training}
    card = replace(STARTER.card, training=training)
    said = "weights trained on consep 18 images"
    assert f"| started from | {said}" in hub_card(Package(STARTER.path, card, STARTER.sha256))
    assert any(line.startswith(f"  started from: {said}") for line in describe(card))
    assert not any("started from" in line for line in describe(STARTER.card)), "it began on the same data"


def test_values_of_a_card_are_escaped() -> None:
    card = replace(
        STARTER.card,
        name="evil: [x]\n---\nlicense: mit",
        licence="mine alone | <script>\n# ha",
        training={"data": {"train": {"a: b\n---\n": 1, "- c": {}}}},
        metrics={"test": {"a": {"pq": "high"}, "b": 3}, "val": [1]},
    )
    text = hub_card(Package(STARTER.path, card, STARTER.sha256))
    data = front_matter(text)
    assert data["license"] == "other" and data["datasets"] == ["- c", "a: b --- "] and "model-index" not in data
    assert "\n# ha" not in text and "<script>" not in text.replace("\\<script\\>", "")

"""`hover-batch compare`: both networks on the same pixels, marks for random weights, a page that is safe to open."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from training_folder import write_folder
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.cohort.record import SlideRecord
from hover_batch.compare import budget
from hover_batch.compare.agreement import Agreement
from hover_batch.compare.budget import Options, Speed, estimate, fit_to_budget
from hover_batch.compare.fields import Place
from hover_batch.compare.sides import random_teacher
from hover_batch.compare.timing import SideResult
from hover_batch.config import InferSettings
from hover_batch.geometry import Box
from hover_batch.model import cost
from hover_batch.model.architectures.hovernet import HoverNetForm, TeacherArch, build_teacher
from hover_batch.model.architectures.unet import StudentArch, build_student
from hover_batch.model.card import Card
from hover_batch.model.heads import MapLayout
from hover_batch.model.package import find_package, save_package
from hover_batch.nuclei.measure import measure
from hover_batch.taxonomy import CONSEP

MARKUP = "<script>alert(1)</script>"
QUICK = ["--side", "128", "--per-slide", "1", "--slides", "1", "--repeats", "1", "--batches", "1,2"]


@pytest.fixture(autouse=True)
def small_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are timed on patches of the side of their tiles, which are small here."""
    for module in (cost, budget):
        monkeypatch.setattr(module, "patch_side", lambda card: card.tile_in)


def compare(*words: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, words)])


def test_a_teacher_without_classes_is_built_for_its_costs() -> None:
    with torch.device("meta"):  # the shapes, without computing 38 million weights and their maps
        side = random_teacher("hovernet_original-kumar", InferSettings(device="cpu"))
        maps = side.network(torch.zeros(1, 3, side.card.tile_in, side.card.tile_in))
    assert maps.shape == (1, 4 + len(side.card.taxonomy.classes), side.card.tile_out, side.card.tile_out)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A narrow HoVerNet and a student that takes little, both of chance; they find something everywhere."""
    folder = tmp_path_factory.mktemp("packages")
    sobel = find_package("starter").card.sobel
    torch.manual_seed(0)
    teacher = build_teacher(TeacherArch("fast", len(CONSEP.classes), 8))
    student = build_student(StudentArch("mit_b0", len(CONSEP.classes)))
    found = {}
    for name, network, architecture, encoder, tile_in, trained in (
        ("narrow", teacher, "hovernet-fast", "", 160, {"steps": 5}),
        ("small", student, "unet", "mit_b0", 96, {"steps": 5, "mean_of": [{"steps": 5}, {"steps": 9}]}),
    ):
        found[name] = folder / f"{name}.safetensors"
        card = Card(
            name=name, architecture=architecture, encoder=encoder, taxonomy=CONSEP, mpp=0.25, tile_in=tile_in,
            tile_out=64, sobel=sobel, licence="none", training={"seen": MARKUP, **trained},
        )  # fmt: skip
        save_package(found[name], network, card, half=False)
    return found


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    image = np.full((300, 420, 3), 240, np.uint8)
    image[150:, 200:] = (150, 60, 170)
    cv2.imwrite(str(folder / "field.png"), image)
    mask = np.zeros((30, 42), np.uint8)
    mask[15:, 26:] = 255
    cv2.imwrite(str(folder / "mask.png"), mask)
    (folder / "cohort.csv").write_text("path,slide_id,mpp,mask_path\nfield.png,field,0.25,mask.png\n")
    return folder / "cohort.csv"


def test_two_packages_are_compared_on_the_same_pixels(packages: dict[str, Path], cohort: Path, tmp_path: Path) -> None:
    truth = tmp_path / "truth"
    truth.mkdir()
    csv = write_folder(truth) / "dataset.csv"
    csv.write_text(csv.read_text().replace(",val", ",test"))
    words = ["--teacher", "--teacher-weights", packages["narrow"], "--student", packages["small"]]
    done = compare(cohort, *words, *QUICK, "--truth", truth, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    first, second = found["sides"]
    assert (first["name"], second["name"]) == ("narrow", "small")
    assert not first["random_weights"] and not second["random_weights"]
    assert {"narrow was trained for 5 steps", "small is the mean of 2 trainings"} < set(found["notes"])
    # The square with most of the mask.
    assert [(f["x"], f["y"], f["shape"]) for f in found["fields"]] == [(256, 128, [128, 128])]
    assert found["ratios"]["parameters"] == first["parameters"] / second["parameters"]
    assert first["seconds_per_patch"].keys() == second["seconds_per_patch"].keys() == {"1", "2"}
    agreed = found["agreement"]
    counts = np.array(agreed["confusion"]["counts"])
    assert agreed["confusion"]["rows"] == [*(c.name for c in CONSEP.nuclei), "none"]
    assert counts[:-1].sum() == agreed["nuclei"][0] and counts[:, :-1].sum() == agreed["nuclei"][1]
    assert [set(truth["sources"]) for truth in found["truth"]] == [{"consep", "tnbc"}] * 2
    page = (tmp_path / "out" / "compare.html").read_text()
    assert MARKUP not in page and "&lt;script&gt;" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page) and "http" not in page.replace("http-equiv", "")


def test_a_network_agrees_with_itself(packages: dict[str, Path], cohort: Path, tmp_path: Path) -> None:
    words = ["--against", packages["small"], "--student", packages["small"], "--precision", "fp32"]
    done = compare(cohort, *words, "--against-precision", "fp32", *QUICK, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    agreed = json.loads((tmp_path / "out" / "compare.json").read_text())["agreement"]
    if agreed["nuclei"][0]:
        assert agreed["pq"] == 1 and agreed["detection_f1"] == 1
    assert agreed["nuclei"][0] == agreed["nuclei"][1]
    assert "panel" not in (tmp_path / "out" / "compare.html").read_text().split("</style>")[1]


@pytest.mark.parametrize(("side", "given"), [(384, False), (512, True)])  # 9 and 16 cells
def test_densities_of_few_cells_are_not_correlated(side: int, given: bool) -> None:
    instances = np.zeros((side, side), np.int32)
    for k, place in enumerate(range(0, side - 10, 130), 1):
        instances[place : place + 9, place // 2 : place // 2 + 9] = k
    layout = MapLayout(len(CONSEP.classes))
    nuclei = measure(instances, np.zeros((layout.planes, side, side), np.uint8), layout)
    agreement = Agreement((CONSEP, CONSEP))
    agreement.add(*[SideResult(instances, nuclei, 0.0, 0.0)] * 2, mpp=0.25)
    found = agreement.to_json()["density_correlation"]
    assert found == pytest.approx(1) if given else found is None


def test_random_weights_are_marked_everywhere(
    packages: dict[str, Path], cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The true width takes minutes on a CPU.
    narrow = build_teacher(TeacherArch("fast", 6, 8))
    monkeypatch.setattr(HoverNetForm, "build", lambda self, card, tensors: narrow)
    words = ["--teacher", "--timing-only", "--student", packages["small"]]
    done = compare(cohort, *words, *QUICK, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "1 field, batch sizes 1, 2, 1 repetition: about" in done.stderr
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert found["sides"][0]["random_weights"] and found["agreement"] is None and found["truth"] is None
    page = (tmp_path / "out" / "compare.html").read_text()
    for text in (done.stdout, page):
        assert "random weights" in text and "this says nothing about quality" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--example", "--teacher"], "--timing-only"),
        (["--example"], "either --teacher or --against"),
        (["--teacher"], "either COHORT or --example"),
        (["--example", "--against", "starter", "--timing-only"], "--timing-only"),
        (["--example", "--teacher", "--timing-only", "--teacher-weights", "nobody"], "hovernet_fast-pannuke"),
        (["--example", "--teacher", "--timing-only", "--minutes", "nan"], "--minutes nan"),
        (["--example", "--teacher", "--timing-only", "--batches", "one"], "--batches one"),
        (["--example", "--against", "nothing.safetensors"], "--against nothing.safetensors"),
        (["--example", "--teacher", "--timing-only", "--truth", "x"], "--truth: random weights cannot be scored"),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOVER_BATCH_CACHE", str(tmp_path / "cache"))
    done = compare(*words, "-o", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_annotated_images_that_are_not_there_are_told_before_the_work(
    packages: dict[str, Path], cohort: Path, tmp_path: Path
) -> None:
    done = compare(
        cohort,
        "--against",
        packages["narrow"],
        "--student",
        packages["small"],
        *QUICK,
        "--truth",
        tmp_path,
        "-o",
        tmp_path / "out",
    )
    assert done.exit_code == 2 and "dataset.csv is missing" in done.stderr
    assert "seconds per patch" not in done.stderr and "field 1 of" not in done.stderr


def test_a_comparison_is_reduced_to_its_time() -> None:
    box = Box(0, 0, 512, 512)
    places = [Place(SlideRecord("s", Path("s.tif"), 2), box, 0.25)] * 6
    student, teacher = Speed(0.25, 256, 320, 256), Speed(5.0, 256, 256, 164)
    assert student.field_seconds(box) == 4 * 0.25 * (320 / 256) ** 2 and teacher.field_seconds(box) == 16 * 5.0
    wanted = Options((1, 4, 16), 3, budget_s=300)
    fits, options = fit_to_budget([student, teacher], places, wanted)
    assert (len(fits), options.repeats, options.batches) == (1, 1, (1, 4, 16))
    assert estimate([student, teacher], fits, options) <= 300 < estimate([student, teacher], places, wanted)
    shortest = fit_to_budget([student, teacher], places, Options((1, 4, 16), 3, budget_s=1))
    assert shortest == (places[:1], Options((1,), 1, budget_s=1))
    assert fit_to_budget([student, teacher], places, Options((1, 4, 16), 3)) == (places, Options((1, 4, 16), 3))

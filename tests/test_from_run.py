"""`segment --from RUN`: new tables from the predictions that a run stored, without its slides."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from hover_batch.cli import app
from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.ledger import Ledger
from hover_batch.errors import InputError, SlideError
from hover_batch.geometry import Box, Mpp, Size
from hover_batch.model.heads import MapLayout
from hover_batch.slide.headers import SlideInfo
from hover_batch.slide.survey import read_info, read_tissue, write_survey
from hover_batch.slide.tissue import TissueMask
from hover_batch.taxonomy import CONSEP, Taxonomy


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["segment", *map(str, arguments)])


def failures(out: Path) -> dict[str, str]:
    with (out / "failures.csv").open(newline="") as file:
        return {row["slide_id"]: row["reason"] for row in csv.DictReader(file)}


def white(folder: Path, *names: str) -> Path:
    """A cohort of pictures without tissue: nothing is predicted, so that runs of it are quick."""
    folder.mkdir()
    for name in names:
        Image.fromarray(np.full((200, 300, 3), 245, np.uint8)).save(folder / f"{name}.png")
    (folder / "cohort.csv").write_text("path,mpp\n" + "".join(f"{name}.png,0.25\n" for name in names))
    return folder / "cohort.csv"


@pytest.fixture(scope="module")
def real(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a real field of 512² pixels with a mask, whose pictures are gone; only read by the tests."""
    folder = tmp_path_factory.mktemp("real")
    cohort = white(folder / "cohort", "empty")
    shutil.copy(sorted((data / "nuclei" / "images").glob("tnbc_*.png"))[0], folder / "cohort" / "field.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[8:60, 4:50] = 255
    Image.fromarray(mask).save(folder / "cohort" / "mask.png")
    cohort.write_text("path,mpp,mask_path,group,site\nfield.png,0.25,mask.png,g,north\nempty.png,0.5,,,\n")
    flags = ["--unit", "256", "--threads", "1", "--halo", "32"]
    assert run(cohort, "-o", folder / "run", *flags).exit_code == 0
    shutil.rmtree(folder / "cohort")
    return folder / "run"


def test_unchanged_settings_give_the_same_bytes(real: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("--from", real, "-o", out)
    assert result.exit_code == 0, result.output
    assert "none, since --from reads no slides" in result.stdout
    for slide_id in ("field", "empty"):
        for name in ("nuclei.parquet", "thumbnail.jpg", "tissue.geojson", "survey.json"):
            path = Path("slides", slide_id, name)
            assert (out / path).read_bytes() == (real / path).read_bytes(), path
        assert not (out / "slides" / slide_id / "predictions.zarr").exists()
    assert pq.read_metadata(out / "slides" / "field" / "nuclei.parquet").num_rows > 20
    with (out / "summary.csv").open(newline="") as ours, (real / "summary.csv").open(newline="") as theirs:
        for new, old in zip(csv.DictReader(ours), csv.DictReader(theirs), strict=True):
            kept = {name: value for name, value in old.items() if not name.startswith(("seconds", "model_busy"))}
            assert kept.items() <= new.items()
    assert "done before" in run("--from", real, "-o", out).stderr


def test_a_run_of_another_device_needs_none_of_it(real: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(real, elsewhere)
    settings = elsewhere / "settings.toml"
    settings.write_text(settings.read_text().replace('device = "cpu"', 'device = "cuda:7"'))
    assert run("--from", elsewhere, "-o", tmp_path / "out").exit_code == 0
    # A store that is laid out otherwise than the settings say fails its slide, as any harm does.
    settings.write_text(settings.read_text().replace("unit = 256", "unit = 512"))
    assert run("--from", elsewhere, "-o", tmp_path / "other").exit_code == 4
    assert "shape does not match" in failures(tmp_path / "other")["field"]


def test_classes_are_merged(real: Path, tmp_path: Path) -> None:
    class_map, out = tmp_path / "map.toml", tmp_path / "out"
    class_map.write_text(
        'stroma = ["spindle", "inflammatory"]\n'
        'neoplastic = { classes = ["epithelial"], color = [1, 2, 3] }\n'
        'miscellaneous = ["miscellaneous"]\n'
    )
    result = run("--from", real, "-o", out, "--class-map", class_map)
    assert result.exit_code == 0, result.output
    path = Path("slides", "field", "nuclei.parquet")
    old, new = (pq.ParquetFile(folder / path).read().to_pandas() for folder in (real, out))
    assert old.geometry.equals(new.geometry) and old.h_od_mean.equals(new.h_od_mean)
    probabilities = {
        "prob_stroma": old.prob_spindle + old.prob_inflammatory,
        "prob_neoplastic": old.prob_epithelial,
        "prob_miscellaneous": old.prob_miscellaneous,
    }
    assert [name for name in new.columns if name.startswith("prob_")] == [
        "prob_miscellaneous", "prob_stroma", "prob_neoplastic"
    ]  # fmt: skip
    for name, expected in probabilities.items():
        np.testing.assert_allclose(new[name], expected, atol=0.004)
    of = {"spindle": "stroma", "inflammatory": "stroma", "epithelial": "neoplastic"}
    mapped = old.type.astype(str).map(lambda name: of.get(name, name))
    assert (mapped == new.type.astype(str)).mean() > 0.9
    assert set(zip(new.type_id, new.type.astype(str), strict=True)) <= set(
        enumerate(["miscellaneous", "stroma", "neoplastic"], start=1)
    )
    taxonomy = json.loads(pq.read_metadata(out / path).metadata[b"hover_batch"])["taxonomy"]
    spindle, inflammatory = CONSEP.classes[4], CONSEP.classes[2]
    assert taxonomy["classes"][2]["color"] == list(spindle.color) != list(inflammatory.color)
    assert taxonomy["classes"][3] == {"id": 3, "name": "neoplastic", "color": [1, 2, 3]}
    # Another order of its lines is the same map; another map is another run.
    class_map.write_text("\n".join(reversed(class_map.read_text().splitlines())))
    assert "done before" in run("--from", real, "-o", out, "--class-map", class_map).stderr
    refused = run("--from", real, "-o", out)
    assert refused.exit_code == 2 and "post.class_map" in refused.stderr


def test_an_active_run_is_refused(real: Path, tmp_path: Path) -> None:
    layout = RunLayout(Path(shutil.copytree(real, tmp_path / "active")))
    with Ledger(layout):
        result = run("--from", layout.root, "-o", tmp_path / "out")
        assert result.exit_code == 2 and "a run is still writing to it; wait until it ends" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_store_that_is_harmed_costs_its_slide_only(real: Path, tmp_path: Path) -> None:
    harmed = tmp_path / "harmed"
    shutil.copytree(real, harmed)
    (harmed / "slides" / "field" / "markers" / "0_1.json").unlink()
    before = sorted(path for path in harmed.rglob("*"))
    assert run("--from", harmed, "-o", tmp_path / "out").exit_code == 3
    assert "unit r00001_c00000" in failures(tmp_path / "out")["field"]
    assert sorted(path for path in harmed.rglob("*")) == before
    shutil.rmtree(harmed / "slides" / "empty")
    assert run("--from", harmed, "-o", tmp_path / "none").exit_code == 4


def test_what_cannot_be_used_is_refused_or_fails(tmp_path: Path) -> None:
    cohort, source, out = white(tmp_path / "cohort", "a", "b"), tmp_path / "source", tmp_path / "out"
    assert run(cohort, "-o", source).exit_code == 0
    a, b = source / "slides" / "a", source / "slides" / "b"
    shutil.rmtree(b / "predictions.zarr")
    assert run("--from", source, "-o", out).exit_code == 3
    assert "--discard-predictions" in failures(out)["b"]
    (b / "slide.json").unlink()
    assert run("--from", source, "-o", out).exit_code == 3
    assert "is not done" in failures(out)["b"]
    held = (a / "survey.json").read_bytes()
    (a / "survey.json").write_bytes(held[:40])
    result = run("--from", source, "-o", tmp_path / "new")
    assert result.exit_code == 2 and "survey.json: cannot be read" in result.stderr
    (a / "survey.json").unlink()
    result = run("--from", source, "-o", tmp_path / "new")
    assert result.exit_code == 2 and "older version" in result.stderr and "none of its slides" in result.stderr
    assert not (tmp_path / "new").exists()


def test_the_output_is_no_run_of_something_else(tmp_path: Path) -> None:
    cohort, source, other = white(tmp_path / "cohort", "a"), tmp_path / "source", tmp_path / "other"
    assert run(cohort, "-o", source).exit_code == run(cohort, "-o", other).exit_code == 0
    for output in (source, source / "new", other):
        result = run("--from", source, "-o", output)
        assert result.exit_code == 2 and f"--output {output}" in result.stderr
    assert run("--from", source, "-o", source, "--force").exit_code == 2
    assert (other / "slides" / "a" / "predictions.zarr" / "zarr.json").exists()
    result = run("--from", tmp_path, "-o", tmp_path / "new")
    assert result.exit_code == 2 and f"--from {tmp_path}: holds no run" in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--unit", "512"], "infer.unit = 4096, not 512"),
        (["--tissue", "all"], "tissue.tissue = auto, not all"),
        (["--model", "other.safetensors"], "model = starter, not other.safetensors"),
        (["--example"], "exactly one of COHORT, --example and --from"),
        (["--class-map", "none.toml"], "--class-map none.toml"),
        (["--sobel-norm", "window"], "--sobel-norm window: needs h and v of the background"),
    ],
)
def test_what_was_predicted_cannot_be_asked_otherwise(tmp_path: Path, flags: list[str], message: str) -> None:
    cohort, source = white(tmp_path / "cohort", "a"), tmp_path / "source"
    assert run(cohort, "-o", source).exit_code == 0
    result = run("--from", source, "-o", tmp_path / "out", *flags)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_maps_of_window_runs_are_whole_and_serve_both(tmp_path: Path) -> None:
    cohort, source = white(tmp_path / "cohort", "a"), tmp_path / "source"
    assert run(cohort, "-o", source, "--sobel-norm", "window").exit_code == 0
    for norm in ("window", "fixed"):
        result = run("--from", source, "-o", tmp_path / norm, "--sobel-norm", norm)
        assert result.exit_code == 0, result.output


ALL = ["miscellaneous", "inflammatory", "epithelial", "spindle"]


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ({"a": ALL[:3]}, "spindle not mapped"),
        ({"a": ALL, "b": ["spindle"]}, "spindle is named twice, in a and in b"),
        ({"a": [*ALL, "dead"]}, "dead is not a class of the model; it has miscellaneous"),
        ({"a": [*ALL, "background"]}, "background is not a class"),
        ({"background": ALL}, "'background' cannot name a class"),
        ({"nuclei": ALL}, "'nuclei' cannot name a class"),
        ({"Nuclei": ALL}, "'Nuclei' cannot name a class"),
        ({"Estimated_x": ALL}, "'Estimated_x' cannot name a class, since estimated_ begins the columns"),
        ({"a b": ALL}, "'a b' cannot name a class"),
        ({"Tumor": ALL[:2], "tumor": ALL[2:]}, "Tumor, tumor differ in upper and lower case only"),
        ({"a": "spindle"}, "write a ="),
        ({"a": []}, "write a ="),
        ({"a": {"classes": ALL, "colour": [1, 2, 3]}}, "write a ="),
        ({"a": {"classes": ALL, "color": [1, 2, 256]}}, "each 0 to 255"),
    ],
)
def test_a_class_map_names_every_class_once(class_map: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CONSEP.merged(class_map)


def test_classes_that_sql_does_not_distinguish_are_refused() -> None:
    for names in (["Tumor", "tumor"], ["a", "a"], ["Nuclei"]):
        classes = [{"id": i, "name": name, "color": [0, 0, 0]} for i, name in enumerate(["background", *names])]
        with pytest.raises(ValueError, match="are the same, or differ in upper and lower case only"):
            Taxonomy.from_json({"name": "own", "classes": classes})


def test_no_class_map_is_the_models_own_taxonomy() -> None:
    assert CONSEP.merged({}) == (CONSEP, (0, 1, 2, 3, 4))


def test_merged_planes_are_sums() -> None:
    layout = MapLayout(4)
    maps = np.arange(layout.planes * 6, dtype=np.uint8).reshape(layout.planes, 2, 3)
    maps[layout.tp, 0, 0] = 0, 128, 3, 128
    merged = layout.merge(maps, (0, 2, 1, 2))
    small = MapLayout(3)
    assert merged.shape == (small.planes, 2, 3) and merged.dtype == np.uint8
    assert merged[small.tp, 0, 0].tolist() == [0, 3, 255]  # two halves, rounded up, are no more than the whole
    assert merged[small.tp, 1, 2].tolist() == [maps[3, 1, 2], maps[5, 1, 2], maps[4, 1, 2] + maps[6, 1, 2]]
    assert (merged[: small.tp.start] == maps[: layout.tp.start]).all()
    assert (merged[small.hematoxylin] == maps[layout.hematoxylin]).all()
    assert (merged[small.eosin] == maps[layout.eosin]).all()


@pytest.mark.parametrize("fill", ["none", "all", "some"])
def test_a_survey_comes_back_as_it_was(tmp_path: Path, fill: str) -> None:
    array = {
        "none": np.zeros((3, 5), bool),
        "all": np.ones((1, 1), bool),
        "some": np.random.default_rng(0).random((37, 41)) < 0.5,
    }[fill]
    bounds = Box(1, 2, 30, 40) if fill == "some" else None
    info = SlideInfo(Size(99, 70), Mpp(0.1 + 0.2, 1 / 3), "cohort", bounds, (1.0, 4.0), "v", 40.0, "f", ("a µm",))
    path = tmp_path / "survey.json"
    write_survey(path, info, TissueMask(array, (2.7, 1 / 7), fill == "some"))
    mask = read_tissue(path)
    assert read_info(path) == info
    assert (mask.array == array).all() and mask.array.dtype == bool
    assert (mask.level0_per_pixel, mask.given) == ((2.7, 1 / 7), fill == "some")
    path.write_text('{"slide": {"bounds": null}, "tissue": {"runs": "1 x"}}')
    for read in (read_info, read_tissue):
        with pytest.raises(SlideError, match="cannot be read"):
            read(path)

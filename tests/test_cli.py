"""The command line: bad input gets one clear message and exit code 2, before anything runs."""

from __future__ import annotations

import csv as csv_module
import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner, Result

from hover_batch.cli import app
from hover_batch.config import SECTION_OF, Settings
from hover_batch.model.architectures.unet import StudentArch, build_student
from hover_batch.model.card import Card
from hover_batch.model.package import find_package, save_package
from hover_batch.taxonomy import CONSEP


def run(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env=env)


@pytest.fixture
def tile(tmp_path: Path) -> Path:
    """A white PNG, 300 × 200."""
    path = tmp_path / "tile.png"
    Image.fromarray(np.full((200, 300, 3), 245, np.uint8)).save(path)
    return path


def cohort(folder: Path, text: str) -> Path:
    path = folder / "cohort.csv"
    path.write_text(text)
    return path


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv_module.DictReader(file))


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("path,mpp\nnone.svs,0.25\n", "none.svs"),
        ("path,slide_id,mpp\ntile.png,a,0.25\ntile.png,a,0.25\n", "row 3"),
        ("path,slide_id,mpp\ntile.png,../x,0.25\n", "../x"),
        ("path\ntile.png\n", "mpp"),
        ("path,mpp,mask_path\ntile.png,0.25,mask.geojson\n", "mask.geojson"),
        ("path,mpp\n", "no slides"),
        ("", "empty"),
        ("path,mpp\ntile.png,-1\n", "mpp"),
    ],
    ids=["missing file", "duplicate", "outside", "no mpp", "unreadable mask", "no rows", "empty", "bad mpp"],
)
@pytest.mark.parametrize("command", ["segment", "plan"])
def test_bad_cohorts_are_refused_before_anything_runs(
    tile: Path, tmp_path: Path, csv: str, message: str, command: str
) -> None:
    (tmp_path / "mask.geojson").write_text("{not json")
    out = tmp_path / "out"
    arguments = [command, cohort(tmp_path, csv)] + (["-o", out] if command == "segment" else [])
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not result.stdout
    assert not out.exists()


def test_all_faults_of_all_rows_come_at_once(tile: Path, tmp_path: Path) -> None:
    csv = "path,slide_id,mpp\nnone.svs,,0.25\ntile.png,../x,0.25\ntile.png,b,zero\ntile.png,c,\n"
    result = run("segment", cohort(tmp_path, csv), "-o", tmp_path / "out")
    assert result.exit_code == 2
    for row in (2, 3, 4, 5):
        assert f"row {row}" in result.stderr


@pytest.mark.parametrize("typed", [("segmnt",), ("models", "shwo"), ("kd", "trian")], ids=" ".join)
def test_a_misspelt_command_is_guessed_once(typed: tuple[str, ...]) -> None:
    result = run(*typed, env={"COLUMNS": "200"})
    assert result.exit_code == 2 and result.stderr.count("Did you mean") == 1


def test_misspelt_variables_are_warned_of(tmp_path: Path) -> None:
    env = {"HOVER_BATCH_BATHC": "4", "HOVER_BATCH_CACHE": "x", "HOVER_BATCH_HALO": "64", "HOVER_BATCH_Q": "1"}
    said = "environment variable HOVER_BATCH_BATHC is not known, and has no effect; did you mean HOVER_BATCH_BATCH?"
    for command in (["plan", tmp_path / "none.csv"], ["status", tmp_path], ["segment", "-o", tmp_path / "out"]):
        first, second, *_ = run(*command, env=env).stderr.splitlines()
        assert first == f"Warning: the {said}"
        assert second == "Warning: the environment variable HOVER_BATCH_Q is not known, and has no effect"
    lines = run("segment", "-o", tmp_path / "out", "--log-format", "json", env=env).stderr.splitlines()
    assert [json.loads(line)["level"] for line in lines] == ["warning", "warning", "error"]


def test_models_are_listed_of_a_folder_that_is_there(tmp_path: Path) -> None:
    result = run("models", "list", tmp_path / "none")
    assert result.exit_code == 2 and not result.stdout
    assert "no such folder" in result.stderr


def test_exactly_one_of_cohort_and_example(tmp_path: Path) -> None:
    for arguments in (["segment"], ["segment", "x.csv", "--example"]):
        result = run(*arguments, "-o", tmp_path / "out")
        assert result.exit_code == 2 and "exactly one" in result.stderr


def test_an_output_that_cannot_be_written(tile: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    csv = cohort(tmp_path, "path,mpp\ntile.png,0.25\n")
    result = run("segment", csv, "-o", tmp_path / "file" / "out")
    assert result.exit_code == 2 and "--output" in result.stderr


def test_somebody_elses_folder_is_left_alone(tile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.doc").write_text("")
    result = run("segment", cohort(tmp_path, "path,mpp\ntile.png,0.25\n"), "-o", out)
    assert result.exit_code == 2 and "thesis.doc" in result.stderr
    assert os.listdir(out) == ["thesis.doc"]


def test_a_changed_setting_is_refused_by_name_and_force_starts_anew(tile: Path, tmp_path: Path) -> None:
    csv, out = cohort(tmp_path, "path,mpp\ntile.png,0.25\n"), tmp_path / "out"
    assert run("segment", csv, "-o", out).exit_code == 0
    before = (out / "slides" / "tile" / "nuclei.parquet").read_bytes()
    result = run("segment", csv, "-o", out, "--halo", "32")
    assert result.exit_code == 2
    assert "halo: 64 → 32" in result.stderr and "--force" in result.stderr
    assert (out / "slides" / "tile" / "nuclei.parquet").read_bytes() == before
    assert run("segment", csv, "-o", out, "--halo", "32", "--force").exit_code == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--unit", "1000"], "--unit 1000"),
        (["--batch", "0"], "--batch 0"),
        (["--batch", "-1"], "--batch -1: auto, or between 1 and 1024"),
        (["--batch", "many"], "--batch"),
        (["--batch", "auto", "--halo", "-1"], "--halo -1"),
        (["--model", "none.safetensors"], "--model none.safetensors"),
        (["--device", "cuda:77"], "--device cuda:77"),
        (["--config", "none.toml"], "--config none.toml"),
    ],
)
def test_bad_settings_name_their_flag(tile: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    result = run("segment", cohort(tmp_path, "path,mpp\ntile.png,0.25\n"), "-o", tmp_path / "out", *flags)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()


def test_flag_goes_before_environment_before_config_before_default(tile: Path, tmp_path: Path) -> None:
    csv = cohort(tmp_path, "path,mpp\ntile.png,0.25\n")
    config = tmp_path / "run.toml"
    config.write_text("\ufeff[infer]\nbatch = 2\nunit = 1024\n\n[post]\nhalo = 48\n")  # Notepad begins files so
    env = {"HOVER_BATCH_UNIT": "512", "HOVER_BATCH_HALO": "32"}
    out = tmp_path / "out"
    assert run("segment", csv, "-o", out, "--config", config, "--halo", "16", env=env).exit_code == 0
    identity = json.loads((out / "run.json").read_text())["results_key"]
    assert (identity["post"]["halo"], identity["infer"]["unit"], identity["infer"]["batch"]) == (16, 512, 2)
    assert identity["tissue"]["mask_mpp"] == Settings().tissue.mask_mpp
    # What a run saved is itself a config: the same command by it resumes.
    assert run("segment", csv, "-o", out, "--config", out / "settings.toml").exit_code == 0


def test_every_setting_is_an_option_with_the_choices_of_config() -> None:
    options = {option.name: option for option in get_command(app).commands["segment"].params}  # type: ignore[attr-defined]
    assert SECTION_OF.keys() - options.keys() == {"max_component", "cluster"}
    for name, section in SECTION_OF.items():
        kind = get_type_hints(type(getattr(Settings(), section)))[name]
        if get_origin(kind) is Literal:
            assert tuple(options[name].type.choices) == get_args(kind)


@pytest.mark.parametrize("flag", ["--tissue", "--precision", "--runtime", "--sobel-norm", "--backend"])
def test_a_choice_that_is_none_is_refused(flag: str, tmp_path: Path) -> None:
    result = run("segment", "cohort.csv", "-o", tmp_path / "out", flag, "other")
    assert result.exit_code == 2 and flag in result.stderr and "other" in result.stderr


def test_plan_writes_nothing_and_tells_size_and_disk(tile: Path, tmp_path: Path) -> None:
    csv = cohort(tmp_path, "path,mpp\ntile.png,0.25\n")
    before = sorted(p.name for p in tmp_path.iterdir())
    result = run("plan", csv)
    assert result.exit_code == 0
    assert "300 × 200" in result.stdout and "GB" in result.stdout and "2 tiles" in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_skip_invalid_runs_the_others_and_lists_the_faulty(tile: Path, tmp_path: Path) -> None:
    csv = cohort(tmp_path, "path,mpp\nnone.svs,0.25\ntile.png,0.25\n")
    out = tmp_path / "out"
    result = run("segment", csv, "-o", out, "--skip-invalid")
    assert result.exit_code == 3
    assert (out / "slides" / "tile" / "slide.json").exists()
    assert "none.svs" in (out / "failures.csv").read_text()


def test_nothing_could_be_processed(tmp_path: Path) -> None:
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    result = run("segment", cohort(tmp_path, "path,mpp\nbroken.svs,0.25\n"), "-o", tmp_path / "out")
    assert result.exit_code == 4
    assert "broken" in (tmp_path / "out" / "failures.csv").read_text()


def _package(path: Path, tile: int) -> Path:
    """A model of random weights that keeps `tile` pixels of a tile."""
    card = Card(
        name="random", architecture="unet", encoder="mit_b0", taxonomy=CONSEP, mpp=0.25, tile_in=tile + 64,
        tile_out=tile, sobel={"h_min": -1e10, "h_max": 1e10, "v_min": -1e10, "v_max": 1e10}, licence="test",
    )  # fmt: skip
    save_package(path, build_student(StudentArch("mit_b0", len(CONSEP.classes))), card)
    return path


def test_units_hold_whole_tiles_of_the_model(tile: Path, tmp_path: Path) -> None:
    csv = cohort(tmp_path, "path,mpp\ntile.png,0.25\n")
    model = _package(tmp_path / "random.safetensors", 512)
    result = run("segment", csv, "-o", tmp_path / "out", "--model", model, "--unit", "768")
    assert result.exit_code == 2 and "--unit 768: must be a multiple of 512" in result.stderr
    assert not (tmp_path / "out").exists()


def test_plan_refuses_a_model_whose_architecture_is_not_installed(tile: Path, tmp_path: Path) -> None:
    card = replace(find_package("starter").card, name="elsewhere", architecture="elsewhere")
    save_package(tmp_path / "elsewhere.safetensors", torch.nn.Conv2d(1, 1, 1), card)
    csv = cohort(tmp_path, "path,mpp\ntile.png,0.25\n")
    result = run("plan", csv, "--model", tmp_path / "elsewhere.safetensors")
    assert result.exit_code == 2 and "install the Python package that contains it" in result.stderr


def test_damaged_weights_stop_the_cohort_and_blame_no_slide(tile: Path, tmp_path: Path) -> None:
    csv = cohort(tmp_path, "path,mpp\ntile.png,0.25\n")
    model = _package(tmp_path / "random.safetensors", 256)
    content = bytearray(model.read_bytes())
    content[-1000] ^= 255
    model.write_bytes(content)
    result = run("segment", csv, "-o", tmp_path / "out", "--model", model, "--tissue", "all")
    assert result.exit_code == 2 and "do not match their card" in result.stderr
    assert (tmp_path / "out" / "failures.csv").read_text().count("\n") == 1


def test_a_row_left_out_for_its_slide_id_does_not_fail_the_one_that_has_it(tile: Path, tmp_path: Path) -> None:
    csv = cohort(tmp_path, "path,slide_id,mpp\ntile.png,a,0.25\ntile.png,a,zero\n")
    out = tmp_path / "out"
    result = run("segment", csv, "-o", out, "--skip-invalid")
    assert result.exit_code == 3
    assert "1 slide done, 1 failed" in result.stdout
    assert [row["status"] for row in table(out / "summary.csv")] == ["done", ""]
    assert [row["status"] for row in table(out / "slides.csv")] == ["done"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("nuclei.parquet", None), ("slide.json", b""), ("slide.json", b"[]"), ("slide.json", b'{"run_key": null}')],
)
def test_a_finished_slide_that_was_harmed_is_finished_again(
    tile: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    csv, out = cohort(tmp_path, "path,mpp\ntile.png,0.25\n"), tmp_path / "out"
    assert run("segment", csv, "-o", out).exit_code == 0
    path = out / "slides" / "tile" / name
    before = (out / "slides" / "tile" / "nuclei.parquet").read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    result = run("segment", csv, "-o", out)
    assert result.exit_code == 0, result.output
    assert (out / "slides" / "tile" / "nuclei.parquet").read_bytes() == before
    result = run("segment", csv, "-o", out)
    assert result.exit_code == 0 and "done before" in result.stderr


def test_the_summary_has_the_cohorts_columns_as_they_are_now(tile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    old = cohort(tmp_path, "path,mpp,patient_id,group,site,age\ntile.png,0.25,p1,control,north,61\n")
    assert run("segment", old, "-o", out).exit_code == 0
    new = cohort(tmp_path, "path,mpp,patient_id,group,site,grade\ntile.png,0.25,p2,case,south,3\n")
    result = run("segment", new, "-o", out)
    assert result.exit_code == 0 and "done before" in result.stderr
    row = table(out / "summary.csv")[0]
    assert [row[name] for name in ("patient_id", "group", "site", "grade")] == ["p2", "case", "south", "3"]
    assert "age" not in row and row["nuclei"] == "0"


def test_predictions_of_slides_done_before_are_discarded_too(tile: Path, tmp_path: Path) -> None:
    csv, out = cohort(tmp_path, "path,mpp\ntile.png,0.25\n"), tmp_path / "out"
    assert run("segment", csv, "-o", out).exit_code == 0
    store = out / "slides" / "tile" / "predictions.zarr"
    assert store.exists()
    result = run("segment", csv, "-o", out, "--discard-predictions")
    assert result.exit_code == 0 and "done before" in result.stderr
    assert not store.exists()


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("tissue = 3", "setting tissue = 3"),
        ("[[infer]]\nunit = 512", "setting infer ="),
        ("[infer]\nunit = 'x'", "infer.unit = 'x': must be a whole number"),
        ("[infer]\nunit = 512.0", "infer.unit = 512.0: must be a whole number"),
        ("[infer]\nthreads = true", "infer.threads = True: must be a whole number"),
        ("[infer]\nunit = 1048576", "--unit 1048576"),
        ("[infer]\nthreads = 1000000", "--threads 1000000"),
        ("[post]\nhalo = [64]", "post.halo = [64]: must be a whole number"),
        ("[post]\nhalo = 1000000", "--halo 1000000"),
        ("[tissue]\nmin_tissue_um2 = inf", "--min-tissue-um2 inf"),
        ("[tissue]\nmask_mpp = 'fine'", "tissue.mask_mpp = 'fine': must be a number"),
        ("[output]\ndiscard_predictions = 'no'", "output.discard_predictions = 'no': must be true or false"),
        ("[model]\nname = 'starter'", "setting model ="),
    ],
)
def test_a_config_of_wrong_types_or_sizes_is_refused_by_name(
    tile: Path, tmp_path: Path, toml: str, message: str
) -> None:
    (tmp_path / "run.toml").write_text(toml)
    csv = cohort(tmp_path, "path,mpp\ntile.png,0.25\n")
    result = run("segment", csv, "-o", tmp_path / "out", "--config", tmp_path / "run.toml")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mpp", ["250", "999", "0.0001", "1e-9"])
def test_a_pixel_size_that_no_slide_has_is_refused(tile: Path, tmp_path: Path, mpp: str) -> None:
    result = run("plan", cohort(tmp_path, f"path,mpp\ntile.png,{mpp}\n"))
    assert result.exit_code == 2 and "row 2" in result.stderr and "mpp" in result.stderr


def test_the_example_leaves_somebody_elses_folder_alone(tmp_path: Path) -> None:
    precious = tmp_path / "project" / "example" / "cohort.csv"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    (tmp_path / "project" / "thesis.doc").write_text("")
    result = run("segment", "--example", "-o", tmp_path / "project")
    assert result.exit_code == 2 and "thesis.doc" in result.stderr
    assert precious.read_text() == "mine" and len(os.listdir(precious.parent)) == 1
    result = run("segment", "--example", "-o", tmp_path / "project" / "thesis.doc")
    assert result.exit_code == 2 and "--output" in result.stderr


@pytest.mark.parametrize("where", ["run.json", "settings.toml", "failures.csv", "summary.csv"])
def test_a_full_disk_is_said_in_one_line_and_blames_no_slide(
    tile: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == where:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    csv, out = cohort(tmp_path, "path,mpp\ntile.png,0.25\n"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        result = run("segment", csv, "-o", out)
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("Error: no space left on disk")
    result = run("segment", csv, "-o", out)
    assert result.exit_code == 0, result.output
    assert table(out / "failures.csv") == []


def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder(tile: Path, tmp_path: Path) -> None:
    csv, out = cohort(tmp_path, "path,mpp\ntile.png,0.25\n"), tmp_path / "out"
    assert run("segment", csv, "-o", out).exit_code == 0
    (out / "summary.csv").unlink()
    (out / "summary.csv").mkdir()
    result = run("segment", csv, "-o", out)
    said = f"Error: {out}/summary.csv: Is a directory; a file belongs there: move or remove the folder"
    assert result.exit_code == 2 and result.stderr.splitlines()[-1] == said
    (out / "summary.csv").rmdir()
    shutil.rmtree(out / "slides" / "tile")
    (out / "slides" / "tile").touch()
    assert run("segment", csv, "-o", out).exit_code == 4
    said = f"{out}/slides/tile: File exists; a folder belongs there: move or remove the file"
    assert [row["reason"] for row in table(out / "failures.csv")] == [said]


def test_plan_takes_the_settings_of_segment_from_the_environment(tile: Path, tmp_path: Path) -> None:
    csv = cohort(tmp_path, "path,mpp\ntile.png,20\n")
    assert " 0.0 GB of stored predictions" not in run("plan", csv).stdout
    discarded = run("plan", csv, env={"HOVER_BATCH_DISCARD_PREDICTIONS": "1"})
    assert " 0.0 GB of stored predictions" in discarded.stdout
    classes = tmp_path / "map.toml"
    classes.write_text('other = ["nobody"]\n')
    wrong = {"UNIT": "1000", "BATCH": "many", "CLASS_MAP": str(classes), "DEVICE": "gpu"}
    for name, value in wrong.items():
        variable = {f"HOVER_BATCH_{name}": value}
        refused, same = run("plan", csv, env=variable), run("segment", csv, "-o", tmp_path / "out", env=variable)
        assert refused.exit_code == 2 and refused.stderr.replace("plan", "segment") == same.stderr


COMMAND = (sys.executable, "-c", "from hover_batch.cli import app; app()")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}


def test_a_terminal_that_is_not_utf8_is_no_reason_to_fail(tile: Path, tmp_path: Path) -> None:
    csv = cohort(tmp_path, "path,mpp\ntile.png,0.5\n")
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([*COMMAND, "plan", csv], env=environment, capture_output=True, encoding="latin-1")
    assert done.returncode == 0, done.stderr
    assert "300 × 200 px at 0.5 µm \\u2192 600 × 400" in done.stdout


def test_a_run_goes_on_when_nobody_reads_its_progress(tile: Path, tmp_path: Path) -> None:
    csv = cohort(tmp_path, "path,mpp\ntile.png,0.25\n")
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [*COMMAND, "segment", csv, "-o", tmp_path / "out"]
    done = subprocess.run(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=writer, text=True)
    os.close(writer)
    assert done.returncode == 0 and "1 slide done, 0 failed" in done.stdout


@pytest.mark.parametrize(
    ("unbuffered", "names"),
    [("", "plan --help"), *(pytest.param(u, "plan segment --help", marks=pytest.mark.slow) for u in "01")],
)
def test_output_that_nobody_reads_changes_no_exit_code(tile: Path, tmp_path: Path, unbuffered: str, names: str) -> None:
    """As after `| head -1`; and messages on a full disk, here /dev/full, stop no run."""
    csv = cohort(tmp_path, "path,mpp\ntile.png,0.25\n")
    environment = ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered.replace("0", "")}
    arguments = {"plan": ["plan", csv], "segment": ["segment", csv, "-o", tmp_path / "out"], "--help": ["--help"]}
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, open(writer, "w") as closed:
        for command in names.split():
            ended = subprocess.run([*COMMAND, *arguments[command]], env=environment, stdout=closed, stderr=full)
            assert ended.returncode == 0, command
        ended = subprocess.run([*COMMAND, "plan", csv], env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("Error: no space left on disk")


def test_an_output_whose_name_is_not_utf8(tile: Path, tmp_path: Path) -> None:
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    result = run("segment", cohort(tmp_path, "path,mpp\ntile.png,0.25\n"), "-o", out)
    assert result.exit_code == 2 and "not valid UTF-8" in result.stderr
    assert not out.exists()


def test_a_device_that_computes_nothing(tile: Path, tmp_path: Path) -> None:
    result = run("segment", cohort(tmp_path, "path,mpp\ntile.png,0.25\n"), "-o", tmp_path / "out", "--device", "meta")
    assert result.exit_code == 2 and "--device meta" in result.stderr


def test_another_picture_under_the_id_of_a_finished_slide_is_refused(tile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = cohort(tmp_path, "path,slide_id,mpp\ntile.png,a,0.25\n")
    assert run("segment", rows, "-o", out, "--unit", "256").exit_code == 0
    before = (out / "slides" / "a" / "slide.json").read_bytes()
    for changed in ("path,slide_id,mpp\nother.png,a,0.25\n", "path,slide_id,mpp\ntile.png,a,0.5\n"):
        Image.fromarray(np.full((200, 300, 3), 200, np.uint8)).save(tmp_path / "other.png")
        result = run("segment", cohort(tmp_path, changed), "-o", out, "--unit", "256")
        assert result.exit_code == 2 and ": a: finished with another file" in result.stderr
        assert (out / "slides" / "a" / "slide.json").read_bytes() == before
    assert run("segment", rows, "-o", out, "--unit", "256", "--force").exit_code == 0


def test_finished_slides_that_are_not_in_the_cohort_are_told_of(tile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = cohort(tmp_path, "path,slide_id,mpp\ntile.png,a,0.25\ntile.png,b,0.25\n")
    assert run("segment", both, "-o", out, "--unit", "256").exit_code == 0
    result = run("segment", cohort(tmp_path, "path,slide_id,mpp\ntile.png,b,0.25\n"), "-o", out, "--unit", "256")
    assert result.exit_code == 0 and "holds results of 1 slide not in this cohort (a)" in result.stderr
    assert (out / "slides" / "a" / "slide.json").is_file()


def test_a_cluster_that_is_not_there_is_told_at_once(tile: Path, tmp_path: Path) -> None:
    rows = cohort(tmp_path, "path,mpp\ntile.png,0.25\n")
    result = run("segment", rows, "-o", tmp_path / "out", "--backend", "ray", "--address", "127.0.0.1:1")
    assert result.exit_code == 2 and "--address 127.0.0.1:1: nothing answers there" in result.stderr


@pytest.mark.parametrize("port", ["-1", "99999", "6379 ", "x", ""])
def test_a_port_that_is_none_is_told_at_once(tile: Path, tmp_path: Path, port: str) -> None:
    rows = cohort(tmp_path, "path,mpp\ntile.png,0.25\n")
    result = run("segment", rows, "-o", tmp_path / "out", "--backend", "ray", "--address", f"127.0.0.1:{port}")
    assert result.exit_code == 2 and "its port is not a number from 1 to 65535" in result.stderr


def test_an_interruption_while_libraries_load_ends_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt")
    command = [sys.executable, "-c", "from hover_batch.__main__ import main; main()"]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")

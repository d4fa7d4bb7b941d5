"""The guide builds without a dead link, and its commands work, one after the other, on a small real slide."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bucket
import cv2
import numpy as np
import pytest
import torch
from deploy_commands import blocks, options
from published import tiles, write_consep, write_pannuke
from random_weights import randomise
from shapely.geometry import box, mapping
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.model.architectures.hovernet import TeacherArch, build_teacher
from hover_batch.model.package import STARTER
from hover_batch.slide.example import write_example, write_pyramidal_tiff
from hover_batch.view.server import Server

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [page.name for page in PAGES if page.parent.name == "docs"]
RANDOM = ("--encoder-weights", "random")
QUICK = {
    "kd train": ["--max-steps", "1", "--size", "64", "--batch", "2", "--threads", "1"],
    "kd train --preset": ["--encoder", "mit_b0", *RANDOM],
    "kd train --model": ["--size", "128", "--width", "8"],
    "kd sweep": [*("--threads", "1", "--", "--max-steps", "1", "--size", "64", "--batch", "2"), *RANDOM],
    "kd evaluate": ["--threads", "1"],
    "compare": ["--side", "128", "--per-slide", "1", "--repeats", "1", "--batches", "1"],
}
"""What is added to a command whose words begin so, to have it end soon."""


def commands(page: Path) -> Iterator[list[str]]:
    """Those of hover-batch in a page's shell blocks, each as its words."""
    for block in blocks(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace("uv run ", ""), comments=True)
            if words and words[0] == "hover-batch":
                yield words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_have_the_flags_that_they_are_given(page: Path) -> None:
    found = list(commands(page))
    assert found
    for words in found:
        options(words[: words.index(">")] if ">" in words else words)


def test_every_command_is_in_the_guide() -> None:
    from typer.main import get_command

    told = {words[1] for page in PAGES for words in commands(page)}
    assert told == set(get_command(app).commands)  # type: ignore[attr-defined]  # a group


def test_the_guide_builds_without_a_dead_link(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "index.html").read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//", page), "fetched from elsewhere"


def test_links_to_files_of_the_repository_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "deploy" / "README.md"):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def write_world(folder: Path) -> None:
    """What the guide's commands name: slides, a cohort, annotated images in their layouts, weights."""
    (folder / "slides").mkdir()
    example = cv2.imread(str(write_example(folder / "example").parent / "he_0.25.tif"))[..., ::-1]
    for name, x in (("case-01", 0), ("case-02", 400)):
        write_pyramidal_tiff(folder / "slides" / f"{name}.tif", np.ascontiguousarray(example[:320, x : x + 320]), 0.25)
    (folder / "cohort.csv").write_text("path,patient_id\nslides/case-01.tif,p1\nslides/case-02.tif,p2\n")
    (folder / "clinical.csv").write_text("patient_id,months,event\np1,12.5,1\np2,30,0\n")
    (folder / "map.toml").write_text(
        'epithelial = ["epithelial"]\nother = ["miscellaneous", "inflammatory", "spindle"]\n'
    )
    some = tiles(8, 192)
    write_consep(folder / "CoNSeP", some[:6], some[6:])
    write_pannuke(folder / "PanNuke", {fold: some[i : i + 2] for i, fold in enumerate("123")})
    for name in ("nuclei", "annotated"):
        annotate(folder / name, some)
    correct(folder / "corrected", folder / "slides" / "case-01.tif")
    for name in ("my-student", "other"):
        shutil.copyfile(STARTER, folder / f"{name}.safetensors")
    network = randomise(build_teacher(TeacherArch("fast", 6, width=8)))
    torch.save({"desc": network.state_dict()}, folder / "hovernet_fast_pannuke_type_tf2pytorch.tar")
    fetched = folder / "cache" / "downloads" / "hovernet_fast-pannuke.pth"
    fetched.parent.mkdir(parents=True)
    torch.save(network.state_dict(), fetched)


def annotate(folder: Path, some: list[Any]) -> None:
    """An instance folder of two sources, with all three splits."""
    folder.mkdir()
    rows = ["sample_id,image,labels,types,source,split"]
    splits = ["train", "val", "test", "test"]
    for number, (image, instances, types) in enumerate(some):
        source, split = ("consep", "tnbc")[number % 2], splits[number // 2]
        for kind, array in (("image", image[..., ::-1]), ("labels", instances), ("types", types)):
            cv2.imwrite(str(folder / f"{number}_{kind}.png"), array)
        typed = f"{number}_types.png" if source == "consep" else ""
        rows.append(f"s{number},{number}_image.png,{number}_labels.png,{typed},{source},{split}")
    (folder / "dataset.csv").write_text("\n".join(rows) + "\n")


def correct(folder: Path, slide: Path) -> None:
    """A slide with two nuclei in a region, as QuPath exports them."""
    folder.mkdir()
    shutil.copyfile(slide, folder / slide.name)
    features = [
        {
            "type": "Feature",
            "geometry": mapping(shape),
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for shape, name in (
            (box(20, 20, 40, 44), "Epithelial"),
            (box(80, 90, 96, 99), "Spindle"),
            (box(0, 0, 200, 150), "Region*"),
        )
    ]
    content = json.dumps({"type": "FeatureCollection", "features": features})
    (folder / slide.with_suffix(".geojson").name).write_text(content)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_the_commands_do_what_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOVER_BATCH_BACKEND", "local")
    monkeypatch.setenv("HOVER_BATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("webbrowser.open", lambda url: True)
    monkeypatch.setattr(Server, "serve_forever", interrupted)
    if name != "first-cohort.md":
        run(["hover-batch", "segment", "slides/", "-o", "out/"])
    with bucket.s3_server(monkeypatch, tmp_path), warnings.catch_warnings():
        if name == "interop.md":  # the dependencies of spatialdata warn at import
            warnings.simplefilter("ignore")
        bucket.put("bucket", {})
        for words in commands(ROOT / "docs" / name):
            run(words)


def interrupted(*_: object) -> None:
    """In place of what `view` does until Ctrl-C."""
    raise KeyboardInterrupt


def run(words: list[str]) -> None:
    said = " ".join(words[1:])
    more = [flag for start, flags in QUICK.items() if _begins(words[1:], start.split()) for flag in flags]
    # As in a shell, a pattern that no file fits stays as it is; count(*) is one.
    found = {word: sorted(map(str, Path().glob(word))) for word in words if "*" in word}
    words = [each for word in words for each in found.get(word) or [word]]
    into = words.index(">") if ">" in words else len(words)
    done = CliRunner().invoke(app, [*words[1:into], *more])
    assert done.exit_code == 0, f"{said}: {done.output}\n{done.exception}"


def _begins(words: list[str], start: list[str]) -> bool:
    """By its commands in order, and its flags anywhere."""
    named = [word for word in start if not word.startswith("-")]
    return words[: len(named)] == named and set(start) <= set(words)

"""`hover-batch view`: which slide it shows, what it refuses, and how it ends."""

from __future__ import annotations

import json
import signal
import socket
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from made_run import write_field, write_run
from numpy.typing import NDArray
from typer.testing import CliRunner
from viewed import command

from hover_batch.cli import app

Field = tuple[Path, NDArray[np.int32], NDArray[np.uint8]]


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Field:
    return write_field(tmp_path_factory.mktemp("field"))


def refused(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["view", *map(str, arguments), "--no-browser"])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    assert "holds no run" in refused(tmp_path)


def test_which_slide_must_be_said_and_known(tmp_path: Path, field: Field) -> None:
    done = [f"s{i}" for i in range(12)]
    run = write_run(tmp_path / "out", *field, done=done, pending=["later"]).root
    ten = ", ".join(done[:10]) + ", …"
    assert f"the run has 13 slides; choose one with --slide ID; done slides: {ten}\n" in refused(run)
    assert f"--slide ../s1: is not a slide of this run; done slides: {ten}\n" in refused(run, "--slide", "../s1")
    unfinished = refused(run, "--slide", "later")
    assert (
        f"--slide later: is not done; see failures.csv, or repeat the segment command to finish it; "
        f"done slides: {ten}\n" in unfinished
    )


def test_a_run_of_which_nothing_is_done_is_refused(tmp_path: Path, field: Field) -> None:
    run = write_run(tmp_path / "out", *field, pending=["later"]).root
    assert "later: is not done" in refused(run) and "no slide of the run is done yet" in refused(run)


def test_a_list_of_slides_that_was_changed_is_refused(tmp_path: Path, field: Field) -> None:
    layout = write_run(tmp_path / "out", *field, done=["a"])
    layout.slides_csv.write_text(layout.slides_csv.read_text().replace("0.25", "a quarter"))
    assert f"{layout.slides_csv}: is corrupted or was edited" in refused(layout.root)


def test_a_slide_without_pixels_is_refused(tmp_path: Path, field: Field) -> None:
    image = tmp_path / "moved.png"
    image.write_bytes(field[0].read_bytes())
    layout = write_run(tmp_path / "out", image, *field[1:], done=["a"])
    image.unlink()
    layout.slide("a").thumbnail_jpg.unlink()
    told = refused(layout.root)
    assert f"{image} does not exist, and {layout.slide('a').thumbnail_jpg} is missing, too; restore the slide" in told


def test_a_port_that_is_taken_is_refused(tmp_path: Path, field: Field) -> None:
    run = write_run(tmp_path / "out", *field, done=["a"]).root
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"--port {port}: Address already in use; give another port" in refused(run, "--port", str(port))


def test_it_opens_the_browser_and_ends_by_ctrl_c(tmp_path: Path, field: Field) -> None:
    run = write_run(tmp_path / "out", *field, done=["a"]).root
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    browser.chmod(0o755)
    with command(run, BROWSER=str(browser)) as (process, url):
        with urllib.request.urlopen(f"{url}info.json", timeout=60) as answer:
            assert json.load(answer)["slide_id"] == "a"
        while not (tmp_path / "opened").is_file() or not (tmp_path / "opened").read_text():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=60)
    assert (tmp_path / "opened").read_text().strip() == url
    assert process.returncode == 0
    assert rest == ""
    assert told == "a: opening …\na: 28 nuclei. Press Ctrl-C to stop.\n"

"""Output of the command on a terminal, without colours, on a dumb terminal, in a log file, a scheduler, a shell."""

from __future__ import annotations

import errno
import json
import os
import pty
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hover_batch.cli import app
from hover_batch.executor import progress
from hover_batch.executor.progress import LINE_EVERY_S, MAX_LINE_EVERY_S, CohortProgress
from hover_batch.logs import LogFormat

ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-c", "from hover_batch.cli import app; app(prog_name='hover-batch')")
PLAIN = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "TERM")}
ENVIRONMENT = PLAIN | {"PYTHONPATH": str(ROOT)}


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """A white PNG and one that is none."""
    Image.fromarray(np.full((200, 300, 3), 245, np.uint8)).save(tmp_path / "tile.png")
    (tmp_path / "broken.svs").write_bytes(b"no slide")
    (tmp_path / "cohort.csv").write_text("path,mpp\ntile.png,0.25\nbroken.svs,0.25\n")
    return tmp_path / "cohort.csv"


def on_a_terminal(arguments: list[str], **environment: str) -> bytes:
    """All that the command writes where stdin, stdout and stderr are one terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, *arguments], env=ENVIRONMENT | environment, stdin=theirs, stdout=theirs, stderr=theirs
    ):
        os.close(theirs)
        written = b""
        while True:
            try:
                some = os.read(ours, 1 << 16)
            except OSError as error:  # how Linux says that the other end is closed
                assert error.errno == errno.EIO
                break
            if not some:
                break
            written += some
    os.close(ours)
    return written


@pytest.mark.parametrize(
    "quiet", [{"NO_COLOR": "1", "TERM": "xterm-256color"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"]
)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], b"Usage"),
        (["segment", "--help"], b"--log-format"),
        (["segment", "--nonsense"], b"No such option"),
        (["plan", "none.csv"], b"no such CSV"),
        (["models", "show", "starter"], b"CC BY-NC-SA"),
        (["--show-completion"], b"HOVER_BATCH_COMPLETE"),
    ],
    ids=["help", "command's help", "usage", "error", "models", "completion"],
)
def test_no_escape_byte_where_none_is_wanted(arguments: list[str], said: bytes, quiet: dict[str, str]) -> None:
    written = on_a_terminal(arguments, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="", **quiet)
    if arguments != ["--show-completion"]:  # which asks what the shell is, and there is none here
        assert said in written
    assert b"\x1b" not in written


def test_a_run_on_a_terminal(cohort: Path, tmp_path: Path) -> None:
    arguments = ["segment", str(cohort), "--unit", "256", "-o"]
    shown = on_a_terminal([*arguments, str(tmp_path / "a")], TERM="xterm-256color")
    assert b"\x1b[" in shown and "━".encode() in shown  # bars
    for name, quiet in (("b", {"NO_COLOR": "1", "TERM": "xterm"}), ("c", {"TERM": "dumb"})):
        plain = on_a_terminal([*arguments, str(tmp_path / name)], **quiet)
        assert b"\x1b" not in plain and b"tile: 0 nuclei" in plain and "━".encode() not in plain


def test_help_is_coloured_elsewhere() -> None:
    assert b"\x1b[" in on_a_terminal(["--help"], TERM="xterm-256color")


@pytest.mark.parametrize("command", ["segment", "cohort build", "kd prepare"])
def test_help_fills_the_lines_of_a_terminal(command: str) -> None:
    """The next word would not fit on any line that does not end a paragraph."""
    shown = CliRunner().invoke(app, [*command.split(), "--help"], terminal_width=80).output
    lines = [line.strip() for line in shown.partition("╭")[0].splitlines()]
    assert len(lines) > 10 and max(map(len, lines)) <= 78
    for line, after in zip(lines, lines[1:], strict=False):
        assert not line or not after or len(f"{line} {after.split()[0]}") > 78


def test_json_lines_for_schedulers(cohort: Path, tmp_path: Path) -> None:
    arguments = [*COMMAND, "segment", str(cohort), "-o", str(tmp_path / "out"), "--unit", "256"]
    before = datetime.now(UTC) - timedelta(milliseconds=1)  # in which times are told
    done = subprocess.run(
        arguments, env=ENVIRONMENT | {"HOVER_BATCH_LOG_FORMAT": "json"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all(before <= datetime.fromisoformat(line["time"]) <= datetime.now(UTC) for line in lines)
    by_event = {line["event"]: line for line in lines if "event" in line}
    finished, failed = by_event["slide_done"], by_event["slide_failed"]
    assert (finished["level"], finished["slide_id"], finished["nuclei"]) == ("info", "tile", 0)
    assert (failed["level"], failed["slide_id"]) == ("error", "broken") and failed["reason"] in failed["message"]
    assert "1 slide done, 1 failed" in done.stdout  # results stay as they are
    # What ends a run is a line, too, and the flag goes before the environment.
    arguments[3:] = ["segment", str(tmp_path / "none.csv"), "-o", str(tmp_path / "other"), "--log-format", "json"]
    ended = subprocess.run(
        arguments, env=ENVIRONMENT | {"HOVER_BATCH_LOG_FORMAT": "text"}, capture_output=True, text=True, check=False
    )
    (line,) = map(json.loads, ended.stderr.splitlines())
    assert ended.returncode == 2 and (line["level"], line["exit_code"]) == ("error", 2)
    assert "no such CSV" in line["message"] and not line["message"].startswith("Error")
    assert CliRunner().invoke(app, ["segment", "x.csv", "--log-format", "xml"]).exit_code == 2


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_a_long_run_leaves_few_lines_in_a_log(
    log_format: LogFormat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    day, step = 24 * 3600, 5
    spoken: list[float] = []
    with CohortProgress(1, log_format) as shown:
        shown.expect(day, 10)
        for second in range(step, day, step):
            now = float(second)
            shown.add_tiles(step)
            spoken += [now] * len(capsys.readouterr().err.splitlines())
    gaps = np.diff(spoken)
    assert len(spoken) < 300 and gaps.min() >= LINE_EVERY_S and gaps.max() <= MAX_LINE_EVERY_S + step
    assert spoken[0] <= LINE_EVERY_S + step


def test_json_progress_has_its_numbers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with CohortProgress(3, LogFormat.json) as shown:
        shown.expect(100, 4)
        now = 20.0
        shown.add_tiles(40)
        shown.warn("a\nwarning of \x1b[31mtwo lines")
    told, warned = map(json.loads, capsys.readouterr().err.splitlines())
    assert told["event"] == "progress" and told["tiles"] == [40, 100] and told["regions"] == [0, 4]
    assert told["slides"] == [0, 3] and told["tiles_per_second"] == 2.0
    assert warned["level"] == "warning" and "\n" in warned["message"]


@pytest.mark.parametrize(
    ("words", "found"),
    [("seg", {"segment"}), ("models ", {"import", "verify", "card"}), ("segment --log", {"--log-format"})],
)
def test_completion_answers_without_heavy_imports(words: str, found: set[str], tmp_path: Path) -> None:
    probe = (
        "import sys, atexit, pathlib; from hover_batch.cli import app\n"
        "atexit.register(lambda: pathlib.Path(sys.argv.pop()).write_text(' '.join(sys.modules)))\n"
        "app(prog_name='hover-batch')"
    )
    asked = {
        "_HOVER_BATCH_COMPLETE": "complete_bash",
        "COMP_WORDS": f"hover-batch {words}",
        "COMP_CWORD": str(words.count(" ") + 1),
    }
    report = tmp_path / "modules"
    done = subprocess.run(
        [sys.executable, "-c", probe, str(report)], env=ENVIRONMENT | asked, capture_output=True, text=True, check=False
    )
    assert found <= set(done.stdout.split()), done.stdout + done.stderr
    assert not {"torch", "ray", "tiatoolbox", "numpy", "pandas"} & set(report.read_text().split())


def test_completion_is_shown_for_the_shell(tmp_path: Path) -> None:
    script = f"{shlex.join(COMMAND)} --show-completion; true"  # not the last command: bash would become it
    done = subprocess.run(["bash", "-c", script], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "_HOVER_BATCH_COMPLETE=complete_bash" in done.stdout, done.stderr

"""slurm.sh, run with an `srun` that only records its arguments."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deploy_commands import DEPLOY, check_shell, options

SCRIPT = DEPLOY / "slurm.sh"
SRUN = f"""#!{sys.executable}
import json, os, sys
json.dump({{"words": sys.argv[1:], "environment": dict(os.environ)}}, open("srun.json", "w"))
"""


@pytest.fixture
def asked(tmp_path: Path) -> Any:
    """`asked("cohort.csv", …)`: the words and the environment with which srun was called; four nodes of 32 cores."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("hostname", "#!/bin/sh\necho '10.0.0.7 192.168.1.7'\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    slurm = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NUM_NODES": "4", "SLURM_CPUS_ON_NODE": "32"}

    def ask(*words: str, **environment: str) -> tuple[list[str], dict[str, str]]:
        environ = {"PATH": path} | slurm | environment
        subprocess.run([SCRIPT, *words], cwd=tmp_path, env=environ, check=True)
        found = json.loads((tmp_path / "srun.json").read_text())
        return found["words"], found["environment"]

    return ask


def of_ray(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Words for srun itself, for `ray symmetric-run`, and of what this runs."""
    ray, runs = words.index("ray"), words.index("--", words.index("ray"))
    return words[:ray], words[ray:runs], words[runs + 1 :]


def test_it_is_sound_shell() -> None:
    check_shell(SCRIPT.read_text())
    assert os.access(SCRIPT, os.X_OK)


def test_whole_nodes_and_one_ray_on_each() -> None:
    """`ray symmetric-run` ends with `ray stop`, which stops all that the user has on the node."""
    directives = re.findall(r"^#SBATCH (.*)", SCRIPT.read_text(), re.MULTILINE)
    assert {"--exclusive", "--ntasks-per-node=1", "--requeue"} <= set(directives)


def test_all_nodes_run_ray_and_the_first_runs_the_cohort(asked: Any) -> None:
    words, _ = asked("my cohort.csv", "-o", "out", "--unit", "2048")
    srun, ray, runs = of_ray(words)
    assert "--cpus-per-task=32" in srun
    assert options([*ray, "--", *runs])["address"] == "10.0.0.7:6379"
    assert options(ray)["min_nodes"] == 4
    segment = options(runs)
    assert (segment["cohort"], str(segment["output"]), segment["unit"]) == ("my cohort.csv", "out", 2048)
    assert segment["address"] == "10.0.0.7:6379"


def test_the_heads_address_can_be_chosen(asked: Any) -> None:
    words, _ = asked("cohort.csv", HEAD_IP="192.168.1.7")
    assert "192.168.1.7:6379" in words and "10.0.0.7:6379" not in words


def test_an_ipv6_address_is_bracketed(asked: Any) -> None:
    for given in ("fd00::7", "[fd00::7]"):
        assert "[fd00::7]:6379" in asked("cohort.csv", HEAD_IP=given)[0]


@pytest.mark.parametrize(
    ("words", "environment", "without", "message"),
    [
        (["cohort.csv"], {"SLURM_JOB_ID": ""}, "", "not in a SLURM job; submit it"),
        (["cohort.csv"], {}, ".venv/bin/activate", "has no .venv; run `uv sync`"),
        (["cohort.csv"], {}, "bin/hostname", "gives no address; set HEAD_IP"),
        ([], {}, "", "no arguments for `hover-batch segment`"),
    ],
)
def test_what_is_missing_is_told_before_ray_starts(
    asked: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    environment: dict[str, str],
    without: str,
    message: str,
) -> None:
    if without == "bin/hostname":
        (tmp_path / without).write_text("#!/bin/sh\necho\n")
    elif without:
        (tmp_path / without).unlink()
    with pytest.raises(subprocess.CalledProcessError) as error:
        asked(*words, **environment)
    assert error.value.returncode == 2 and message in capfd.readouterr().err
    assert not (tmp_path / "srun.json").exists()


def test_ray_takes_its_flags_on_head_and_workers(asked: Any) -> None:
    """`ray symmetric-run` hands them to `ray start`, the same to both."""
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    _, ray, _ = of_ray(asked("cohort.csv")[0])
    flags = curate_and_validate_ray_start_args(ray[2:])
    head = options(["ray", "start", "--head", "--node-ip-address=10.0.0.7", "--port=6379", *flags])
    worker = options(["ray", "start", "--address", "10.0.0.7:6379", "--block", *flags])
    for start in (head, worker):
        assert (start["dashboard_host"], start["num_cpus"]) == ("127.0.0.1", 32)
    # Ray refuses what is the head's alone on a worker.
    assert worker["include_dashboard"] is worker["port"] is None


def test_each_job_has_a_token_of_its_own_that_no_command_line_shows(asked: Any) -> None:
    tokens = set()
    for _ in range(2):
        words, environment = asked("cohort.csv")
        assert environment["RAY_AUTH_MODE"] == "token"
        token = environment["RAY_AUTH_TOKEN"]
        assert re.fullmatch("[0-9a-f]{64}", token)
        assert token not in " ".join(words)
        tokens.add(token)
    assert len(tokens) == 2


def test_rays_files_are_the_jobs_own(asked: Any) -> None:
    _, environment = asked("cohort.csv")
    assert environment["RAY_TMPDIR"] == "/tmp/hb-1234567"

"""A cluster from the commands of ray-onprem.yaml, with two nodes on this machine, and a cohort submitted as a job."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from deploy_commands import DEPLOY
from PIL import Image

from hover_batch.cohort.events import stream_events

pytestmark = pytest.mark.slow

HEAD, WORKER, ANOTHER, DASHBOARD = "127.0.0.1", "127.0.0.2", "127.0.0.3", "http://127.0.0.1:8265"
UP_S = 120
"""A head is up in some 20 s, and later on a busy machine."""


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """Of the cluster's user, with the token where Ray looks for it; short, since Ray's sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="hb-", dir="/tmp"))
    (folder / ".ray").mkdir()
    (folder / ".ray/auth_token").write_text(secrets.token_hex(32))
    (folder / "venv-hover-batch").symlink_to(Path(sys.executable).parents[1])
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def environment(home: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {
        "PATH": path,
        "HOME": str(home),
        "RAY_TMPDIR": str(home),
        "RAY_HEAD_IP": HEAD,
        "OMP_NUM_THREADS": "1",
        # The nodes are no machines of their own: Ray would see that the tests were started by `uv run`, and start its
        # workers so.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


@pytest.fixture(scope="module")
def own_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is another one on each node."""
    return tmp_path_factory.mktemp("own-disk")


class Site:
    """The cluster of ray-onprem.yaml: its nodes are processes of this machine, by their addresses."""

    def __init__(self, environment: dict[str, str], own_disk: Path) -> None:
        file: dict[str, Any] = yaml.safe_load((DEPLOY / "ray-onprem.yaml").read_text())
        head, self._worker = (file[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
        # No autoscaler here, which would start the other node by SSH.
        self._head = re.sub(r" --autoscaling-config=\S+", "", head.replace("HEAD-IP", HEAD))
        self._environment, self._own_disk = environment, own_disk
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start_head(self) -> None:
        """Without cores."""
        command = ["bash", "-c", f"{self._head} --num-cpus=0 --block"]
        self._nodes[HEAD] = subprocess.Popen(command, env=self._environment)
        _wait_for(f"{DASHBOARD}/api/gcs_healthz")
        _wait_for(f"http://{HEAD}:52365/api/local_raylet_healthz")  # its agent, which takes the jobs

    def start_worker(self, address: str) -> None:
        """With two cores. What it sees in `own_disk` is a disk of its own, as on another machine."""
        worker = f"{self._worker} --node-ip-address={address} --num-cpus=2 --block"
        command = ["unshare", "--mount", "bash", "-c", f"mount -t tmpfs none {self._own_disk} && {worker}"]
        self._nodes[address] = subprocess.Popen(command, env=self._environment)
        _wait_for(f"http://{address}:52365/api/local_raylet_healthz")

    def end(self, *addresses: str, at_once: bool = False) -> None:
        """By kill -9 where `at_once`."""
        ended = [self._nodes.pop(address) for address in addresses or tuple(self._nodes)]
        ours = [psutil.Process(node.pid) for node in ended]
        ours += [process for node in ours for process in node.children(recursive=True)]
        for process in ours:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill() if at_once else process.terminate()
        for process in psutil.wait_procs(ours, timeout=10)[1]:
            process.kill()
        for node in ended:
            node.wait()


@pytest.fixture(scope="module")
def cluster(environment: dict[str, str], own_disk: Path) -> Iterator[Site]:
    """It is up: a head and a node."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        pytest.skip("other interfaces than loopback are up: run `scripts/loopback uv run pytest -m slow`")
    site = Site(environment, own_disk)
    try:
        site.start_head()
        site.start_worker(WORKER)
        yield site
    finally:
        site.end()


def _wait_for(address: str) -> None:
    until = time.monotonic() + UP_S
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < until, f"{address} does not answer"
            time.sleep(1)


def submit(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = ["ray", "job", "submit", "--address", DASHBOARD, "--", *words]
    until = time.monotonic() + UP_S
    while True:
        job = subprocess.run(command, env=environment, capture_output=True, text=True)
        # The head hears of its own agent some seconds after the agent answers.
        if "No available agent" not in job.stderr or time.monotonic() > until:
            return job
        time.sleep(2)


def test_a_cohort_is_done_by_a_job(cluster: Site, environment: dict[str, str], tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64, 3), 230, np.uint8)).save(tmp_path / "field.png")
    (tmp_path / "cohort.csv").write_text("path,mpp\nfield.png,0.25\n")
    out = tmp_path / "out"
    words = ["segment", str(tmp_path / "cohort.csv"), "-o", str(out), "--address", "auto", "--tissue", "all"]
    job = submit(environment | {"RAY_AUTH_MODE": "token"}, "hover-batch", *words)
    assert job.returncode == 0, job.stdout + job.stderr
    assert (out / "slides/field/slide.json").exists()


def test_an_output_that_a_node_does_not_see_is_refused(
    cluster: Site, environment: dict[str, str], own_disk: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.full((64, 64, 3), 230, np.uint8)).save(tmp_path / "field.png")
    (tmp_path / "cohort.csv").write_text("path,mpp\nfield.png,0.25\n")
    words = ["segment", str(tmp_path / "cohort.csv"), "-o", str(own_disk / "out"), "--address", "auto"]
    job = submit(environment | {"RAY_AUTH_MODE": "token"}, "hover-batch", *words)
    assert job.returncode != 0
    assert f"{WORKER} cannot see what is written there" in job.stdout + job.stderr
    assert not (own_disk / "out" / "run.json").exists()


def test_a_job_survives_the_loss_of_a_node(cluster: Site, environment: dict[str, str], tmp_path: Path) -> None:
    """kill -9 of all processes of one of two, when it has work under way."""
    cluster.start_worker(ANOTHER)
    noise = np.random.default_rng(0).integers(90, 240, (4, 512, 512, 3), np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"s{number}.png")
    (tmp_path / "cohort.csv").write_text("path,mpp\n" + "".join(f"s{number}.png,0.25\n" for number in range(4)))
    out = tmp_path / "out"
    words = ["segment", str(tmp_path / "cohort.csv"), "-o", str(out), "--address", "auto"]
    words += ["--tissue", "all", "--unit", "256", "--batch", "1", "--threads", "1"]
    with ThreadPoolExecutor() as pool:
        job = pool.submit(submit, environment | {"RAY_AUTH_MODE": "token"}, "hover-batch", *words)
        until = time.monotonic() + 2 * UP_S
        while told(out, "unit_done") < 2:
            assert time.monotonic() < until and not job.done(), job.result()
            time.sleep(0.1)
        cluster.end(ANOTHER, at_once=True)
        done = job.result()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.glob("slides/*/slide.json"))) == 4
    assert told(out, "nodes_changed") and not told(out, "strike")


def told(out: Path, name: str) -> int:
    return sum(event["event"] == name for event in stream_events(out / "logs" / "events.jsonl"))


@pytest.mark.parametrize("token", [None, "f" * 64])
def test_nobody_without_the_token_may_send_one(
    cluster: Site, environment: dict[str, str], tmp_path: Path, token: str | None
) -> None:
    stranger = environment | {"HOME": str(tmp_path)}
    if token:
        stranger |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    job = submit(stranger, "touch", str(tmp_path / "was-here"))
    assert job.returncode != 0
    assert "Authentication" in job.stderr
    assert not (tmp_path / "was-here").exists()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{DASHBOARD}/api/jobs/")


def test_the_dashboard_listens_on_loopback_alone(cluster: Site) -> None:
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == 8265}
    assert listening == {HEAD}

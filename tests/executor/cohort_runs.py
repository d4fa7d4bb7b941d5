"""Runs of small cohorts on either backend, and what they need of the machine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import hover_batch.segment
from hover_batch.cohort.layout import RunLayout
from hover_batch.cohort.record import Url
from hover_batch.config import EngineSettings, InferSettings, Settings, TissueSettings
from hover_batch.executor.backend import OpenBackend
from hover_batch.executor.local import LocalExecutor
from hover_batch.executor.protocol import RunContext
from hover_batch.executor.resources import EnginePlan, Node, Resources
from hover_batch.model.predict import load_predictor
from hover_batch.segment import Outcome, run_segment
from hover_batch.stored_run import StoredRun

HERE = Path(__file__).parent
CPUS, GPUS = 3, 4
"""Logical resources of the tests' cluster: there is no GPU, the networks on them sleep."""

SETTINGS = Settings(
    tissue=TissueSettings(tissue="all"),
    infer=InferSettings(unit=256, batch=2, precision="fp32", runtime="torch", threads=1, device="cpu"),
    engine=EngineSettings(backend="local"),
)
"""Settings of the small cohorts: 16 units for a field of 1000² pixels."""


def on_loopback() -> None:
    """Skip if others could reach Ray's servers, which listen on all interfaces."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        pytest.skip("other interfaces than loopback are up: run `scripts/loopback uv run pytest`, as the CI does")


@contextlib.contextmanager
def file_system(folder: Path, size: str) -> Iterator[Path]:
    """Mount a file system of that size at `folder`."""
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here: this needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def engine_of(networks: int = 1, gpus: bool = False, units_at_once: int = 2) -> EnginePlan:
    """A plan for the tests' cluster with so many networks, on GPUs or on the CPU."""
    return EnginePlan(
        resources=Resources((Node(CPUS, GPUS, 1 << 33),)),
        networks=networks,
        network_gpus=int(gpus),
        network_cpus=0 if gpus else 1,
        threads=1,
        units_at_once=units_at_once,
        slots=CPUS if gpus else CPUS - networks,
        regions_at_once=max(1, CPUS - 1 if gpus else CPUS - networks - 1),
    )


def nuclei(out: Path) -> list[tuple[Any, ...]]:
    """(slide_id, x, y) of all nuclei of a run."""
    named = [(path.parent.name, pq.read_table(path)) for path in sorted((out / "slides").glob("*/nuclei.parquet"))]
    return [
        (name, x, y)
        for name, table in named
        for x, y in zip(table["centroid_x"].to_pylist(), table["centroid_y"].to_pylist(), strict=True)
    ]


def note(fault: str, out: Path, reference: Path, attempts: int, recovery_s: float) -> None:
    """Check that the tables are those of the undisturbed run `reference`, byte for byte; report what the fault cost.

    The report, a line of JSON, is appended to the file that the environment variable FAULT_REPORT names. `attempts`: of
    the task that the fault interrupted.
    """
    found, wanted = nuclei(out), nuclei(reference)
    row = {
        "fault": fault,
        "attempts": attempts,
        "recovery_s": round(recovery_s, 1),
        "nuclei": len(wanted),
        "lost": len(set(wanted) - set(found)),
        "duplicate": len(found) - len(set(found)),
    }
    if report := os.environ.get("FAULT_REPORT"):
        with open(report, "a") as file:
            file.write(json.dumps(row) + "\n")
    assert len(wanted) > 30 and row["lost"] == row["duplicate"] == 0 and len(found) == len(wanted)
    both = [
        {p.parent.name: p.read_bytes() for p in (of / "slides").glob("*/nuclei.parquet")} for of in (out, reference)
    ]
    assert both[0] == both[1]


Run = Callable[..., Outcome]


def runner(backend: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    def run(
        cohort: Path | StoredRun,
        out: Path,
        load: Any = load_predictor,
        plan: EnginePlan | None = None,
        settings: Settings = SETTINGS,
        retry_failed: bool = False,
        bucket: str | None = None,
        force: bool = False,
    ) -> Outcome:
        def execute(context: RunContext, slides: Any) -> None:
            if backend == "local":
                LocalExecutor(context, load).run(slides)
            else:
                from hover_batch.executor.ray import RayExecutor

                engine = plan or engine_of(0 if isinstance(cohort, StoredRun) else 1)
                RayExecutor(context, engine, load).run(slides)

        @contextlib.contextmanager
        def open_backend(settings: Settings, layout: RunLayout, *, predicts: bool = True) -> Iterator[OpenBackend]:
            yield OpenBackend(settings, execute)

        monkeypatch.setattr(hover_batch.segment, "open_backend", open_backend)
        source = cohort if isinstance(cohort, StoredRun) else str(cohort)
        return run_segment(
            source,
            out,
            settings,
            skip_invalid=False,
            force=force,
            command=["segment", "cohort.csv"],
            retry_failed=retry_failed,
            bucket=Url(bucket) if bucket else None,
        )

    return run

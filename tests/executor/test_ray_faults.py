"""Processes crash during their work: one crash costs an attempt, two cost the slide, none the cohort."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest
from accelerators import LoadBroken, LoadDeadly, LoadQuick, die_loading
from cohort_runs import SETTINGS, Run, engine_of, runner
from test_contract import events, tables

from hover_batch.errors import HoverBatchError

Fields = Callable[..., Path]


def strikes(out: Path) -> list[tuple[object, object]]:
    return [(e["slide_id"], e["stage"]) for e in events(out, "strike")]


def test_a_slide_that_kills_its_readers_is_quarantined(
    fields: Fields, run_on_ray: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSEGV in the reader, twice, with intact slides before and after it."""
    out = tmp_path / "out"
    outcome = run_on_ray(fields("a", "sigsegv", "b"), out, LoadQuick())
    assert outcome.exit_code == 3
    failures = pd.read_csv(out / "failures.csv")
    assert list(failures.slide_id) == ["sigsegv"]
    assert "died" in failures.reason[0] and "2 times" in failures.reason[0]
    assert {slide for slide, _ in strikes(out)} == {"sigsegv"}
    here = runner("local", monkeypatch)  # the fault is planted in the cluster's processes alone
    here(fields("a", "sigsegv", "b"), tmp_path / "reference", LoadQuick())
    reference = tables(tmp_path / "reference")
    assert tables(out) == {name: reference[name] for name in ("a", "b")}

    # From then on it is skipped and listed as failed, unless the user asks for a retry.
    again = here(fields("a", "sigsegv", "b"), out, LoadQuick())
    assert again.exit_code == 3 and "--retry-failed" in again.failures[0].reason
    assert again.failures[0].reason.startswith(failures.reason[0])
    assert len([e for e in events(out, "slide_started") if e["slide_id"] == "sigsegv"]) == 1
    assert here(fields("a", "sigsegv", "b"), out, LoadQuick(), retry_failed=True).exit_code == 0
    assert tables(out) == reference
    assert here(fields("a", "sigsegv", "b"), out, LoadQuick()).exit_code == 0


def test_results_that_are_visible_late_are_waited_for(
    fields: Fields, run_on_ray: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: Path
) -> None:
    """As on a network file system: a marker before its shard, and a part after the slide is being finalized."""
    out, names = tmp_path / "out", ("late-shard-once", "late-part-once")
    assert run_on_ray(fields(*names), out, LoadQuick()).exit_code == 0
    assert all((ray_cluster / f"{name.removesuffix('-once')}-{name}").exists() for name in names), "it was not planted"
    assert not strikes(out)
    runner("local", monkeypatch)(fields(*names), tmp_path / "reference", LoadQuick())
    assert tables(out) == tables(tmp_path / "reference")


def test_a_unit_of_an_unreachable_network_is_retried_if_it_was_the_last_one_under_way(
    ray_cluster: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop must not take the moment in which nothing runs for the end."""
    from hover_batch.executor.network_pool import Network
    from hover_batch.executor.ray import RayExecutor

    context: Any = SimpleNamespace(
        package=None,
        settings=SETTINGS,
        recorder=SimpleNamespace(progress=SimpleNamespace(warn=None), networks=0, log_event=None),
        disk=SimpleNamespace(full=False, report_full=None),
    )
    executor = RayExecutor(context, engine_of(0))
    retried: list[Exception] = []
    cause, error = RuntimeError("its process died"), cast(Any, None)
    monkeypatch.setattr(executor._pool, "_cause", lambda network, error: cause)
    executor._pool._unreachable.append((Network(None, 0), error, retried.append))
    executor._wait()
    assert retried == [cause]
    with pytest.raises(RuntimeError, match="nothing is under way"):
        executor._wait()


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        pytest.param("sigsegv-once", "infer", marks=pytest.mark.faults),  # quick: the reader that dies twice, above
        ("post-once", "post"),
        pytest.param("finalize-once", "finalize", marks=pytest.mark.faults),
    ],
)
def test_one_death_costs_one_attempt(
    fields: Fields, run_on_ray: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: str
) -> None:
    out = tmp_path / "out"
    outcome = run_on_ray(fields("a", name), out, LoadQuick())
    assert outcome.exit_code == 0
    assert strikes(out) == [(name, stage)]
    runner("local", monkeypatch)(fields("a", name), tmp_path / "reference", LoadQuick())
    assert tables(out) == tables(tmp_path / "reference")


@pytest.mark.faults  # quick: a network that raises is replaced, and those that die while they load are noticed
def test_a_network_that_dies_is_replaced(
    fields: Fields, run_on_ray: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The units that were under way in it are retried, each alone, with the same results."""
    out = tmp_path / "out"
    outcome = run_on_ray(fields("a", "b"), out, LoadDeadly(tmp_path), engine_of(units_at_once=2))
    assert outcome.exit_code == 0
    assert (tmp_path / "death-0").exists()
    assert 1 <= len(strikes(out)) <= 2 and {stage for _, stage in strikes(out)} == {"infer"}
    runner("local", monkeypatch)(fields("a", "b"), tmp_path / "reference", LoadQuick())
    assert tables(out) == tables(tmp_path / "reference")


def test_a_network_that_raises_is_replaced(
    fields: Fields, run_on_ray: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its device broke: its process lives, but every batch raises. Another network does its units."""
    out = tmp_path / "out"
    outcome = run_on_ray(fields("a", "b"), out, LoadBroken(tmp_path))
    assert outcome.exit_code == 0
    assert {e["stage"] for e in events(out, "strike")} == {"infer"}
    assert all("device is lost" in str(e["reason"]) for e in events(out, "strike"))
    runner("local", monkeypatch)(fields("a", "b"), tmp_path / "reference", LoadQuick())
    assert tables(out) == tables(tmp_path / "reference")


def test_networks_that_die_while_they_load_stop_the_cohort_and_blame_no_slide(
    fields: Fields, run_on_ray: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(HoverBatchError, match="died 3 times in a row while it was loading"):
        run_on_ray(fields("a"), tmp_path / "out", die_loading)
    printed = capfd.readouterr().err
    assert [f"starting another one (failed {n} of at most 3 times)" in printed for n in (1, 2, 3)] == [
        True,
        True,
        False,
    ]
    assert list(pd.read_csv(tmp_path / "out" / "failures.csv").slide_id) == []
    assert strikes(tmp_path / "out") == []

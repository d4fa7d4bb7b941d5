"""Resources of a machine are divided so that nothing waits for cores forever, and memory is not exceeded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hover_batch.config import EngineSettings, InferSettings, Settings
from hover_batch.errors import InputError
from hover_batch.executor.resources import Node, Resources, engine_plan, resource_lines, runs_in_process
from hover_batch.model.package import find_package
from hover_batch.plan import PlannedSlide

CARD = find_package("starter").card


nodes = st.lists(
    st.builds(Node, cpus=st.integers(1, 64), gpus=st.integers(0, 8), memory=st.integers(1 << 30, 1 << 40)),
    min_size=1,
    max_size=4,
)


@given(nodes=nodes, threads=st.integers(0, 64), unit=st.sampled_from([256, 1024, 4096]))
def test_readers_always_find_a_core(nodes: list[Node], threads: int, unit: int) -> None:
    """Whichever machines the networks are put on, none is filled by them; and there is room for all of them."""
    settings = Settings(infer=InferSettings(threads=threads, unit=unit))
    plan = engine_plan(Resources(tuple(nodes)), settings, CARD)
    assert plan.units_at_once >= 1 and plan.regions_at_once >= 1
    assert plan.slots >= 1 and plan.networks * plan.network_cpus + plan.slots == plan.resources.cpus
    assert plan.regions_at_once < plan.slots or plan.regions_at_once <= len(nodes)
    if plan.resources.gpus:
        assert (plan.networks, plan.network_gpus, plan.network_cpus) == (plan.resources.gpus, 1, 0)
    else:
        assert plan.network_cpus < min(node.cpus for node in nodes)
        assert plan.networks <= sum(max(1, (node.cpus - 1) // max(1, plan.network_cpus)) for node in nodes)


@given(cpus=st.integers(1, 256), gpus=st.integers(0, 16), memory=st.integers(1 << 30, 1 << 40))
def test_without_predictions_all_cores_post_process(cpus: int, gpus: int, memory: int) -> None:
    plan = engine_plan(Resources((Node(cpus, gpus, memory),)), Settings(), CARD, predicts=False)
    assert (plan.networks, plan.network_cpus, plan.slots) == (0, 0, cpus)
    assert 1 <= plan.regions_at_once <= cpus and "no network" in plan.lines()[1]


def test_little_memory_means_little_at_once() -> None:
    large = engine_plan(Resources((Node(32, 2, 1 << 38),)), Settings(), CARD)
    small = engine_plan(Resources((Node(32, 2, 4 << 30),)), Settings(), CARD)
    assert (large.units_at_once, large.regions_at_once) == (3, 31)
    assert small.units_at_once < 3 and small.regions_at_once <= 2
    assert engine_plan(Resources((Node(64, 0, 16 << 30),)), Settings(), CARD).networks == 4


def test_more_than_there_is_is_refused() -> None:
    there = Resources((Node(4, 1, 1 << 34), Node(4, 1, 1 << 34)))
    for engine, flag in ((EngineSettings(cpus=9), "--cpus 9"), (EngineSettings(gpus=3), "--gpus 3")):
        with pytest.raises(InputError, match=flag):
            there.limited(Settings(engine=engine))
    assert there.limited(Settings(engine=EngineSettings(cpus=3))).nodes == (Node(3, 1, 1 << 34), Node(0, 1, 1 << 34))
    assert there.limited(Settings(engine=EngineSettings(gpus=0))).gpus == 0


def test_a_cluster_may_yet_bring_what_is_asked_for() -> None:
    there = Resources((Node(4, 1, 1 << 34),))
    asks = Settings(engine=EngineSettings(cpus=9, gpus=3))
    assert there.at_most(asks) == there
    assert engine_plan(there.at_most(asks), asks, CARD).networks == 3


@given(before=nodes, after=nodes)
def test_networks_stay_as_they_are_when_machines_come_and_go(before: list[Node], after: list[Node]) -> None:
    begun = engine_plan(Resources(tuple(before)), Settings(), CARD)
    now = engine_plan(Resources(tuple(after)), Settings(), CARD, previous=begun)
    assert (now.threads, now.network_cpus, now.network_gpus) == (begun.threads, begun.network_cpus, begun.network_gpus)
    assert now.networks >= 1 and now.regions_at_once >= 1
    if begun.network_gpus:
        assert now.networks == max(1, now.resources.gpus)
    elif now.networks * now.network_cpus > now.resources.cpus:
        assert now.networks == 1, "where no machine has room, one network waits for one that has"


@given(before=nodes, after=nodes, times=st.integers(1, 4))
def test_work_that_was_halved_stays_halved_when_machines_come_and_go(
    before: list[Node], after: list[Node], times: int
) -> None:
    """Memory ran out; no change of the nodes brings back what was too much."""
    begun = engine_plan(Resources(tuple(before)), Settings(), CARD)
    halved = begun
    for _ in range(times):
        halved = halved.halved() or halved
    assert engine_plan(Resources(tuple(before)), Settings(), CARD, previous=halved) == halved
    now = engine_plan(Resources(tuple(after)), Settings(), CARD, previous=halved)
    whole = engine_plan(Resources(tuple(after)), Settings(), CARD, previous=begun)
    assert (
        now.regions_at_once == max(1, -(-whole.regions_at_once // 2**halved.halvings))
        and now.units_at_once <= halved.units_at_once
    )


def test_gpus_are_those_that_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Node.here().gpus == 0


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (EngineSettings(backend="local"), "one process"),
        (EngineSettings(address="10.0.0.1:6379"), "cluster at 10.0.0.1:6379"),
        (EngineSettings(backend="ray", cpus=1), "cores: 1"),
        (EngineSettings(cpus=1), "one process, because Ray would take longer to start than 512 tiles take"),
        (EngineSettings(cpus=1), "threads of the network: 1"),
    ],
)
def test_plan_says_what_would_be_asked_for(engine: EngineSettings, words: str) -> None:
    assert words in "\n".join(resource_lines(Settings(engine=engine), CARD, [planned(400), planned(112)]))


def planned(tiles: int, grid: object = "known") -> PlannedSlide:
    """A slide with a number of tiles; without a grid, one in other storage."""
    return cast(PlannedSlide, SimpleNamespace(tiles=tiles, grid=grid))


def test_few_tiles_are_processed_without_ray() -> None:
    auto = EngineSettings()
    assert runs_in_process(auto, [planned(400), planned(112)])
    assert not runs_in_process(auto, [planned(400), planned(113)])
    assert not runs_in_process(auto, [planned(0, None)])
    assert not runs_in_process(EngineSettings(backend="ray"), [planned(1)])
    assert not runs_in_process(EngineSettings(address="auto"), [planned(1)])

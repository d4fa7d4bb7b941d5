"""Networks are kept busy on Ray: their load, the overhead of Ray, and constant memory. Figures are printed.

The accelerator is simulated: a network holds its device by sleeping, as a GPU would while the CPU is free.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from accelerators import LoadQuick
from cohort_runs import SETTINGS, Run, engine_of, runner
from PIL import Image
from test_contract import events

Fields = Callable[..., Path]
BATCH_S = 0.5
"""Time of a batch of 8 tiles; a unit of 1024² pixels has two: one second."""
FAST = replace(SETTINGS, infer=replace(SETTINGS.infer, unit=1024, batch=8))


def say(line: str) -> None:
    """Print a figure, for runs with -s; stdout is redirected while a cluster is up."""
    print(f"\n{line}", file=sys.stderr)


def large_fields(folder: Path, n: int) -> Path:
    """A cohort of n pictures of 2048² pixels, four units each."""
    rng = np.random.default_rng(0)
    picture = np.full((2048, 2048, 3), 230, np.uint8)
    y, x = np.mgrid[-12:13, -12:13]
    disc = y**2 + x**2 < 100
    for cy, cx in rng.integers(12, 2035, (900, 2)):
        picture[cy - 12 : cy + 13, cx - 12 : cx + 13][disc] = (90, 60, 140)
    for i in range(n):
        Image.fromarray(picture).save(folder / f"s{i:02d}.png", compress_level=1)
    (folder / "cohort.csv").write_text("path,mpp\n" + "".join(f"s{i:02d}.png,0.25\n" for i in range(n)))
    return folder / "cohort.csv"


def spans(out: Path, event: str, stage: str) -> dict[object, list[tuple[float, float]]]:
    """Slide → when each of its units was in that stage."""
    found: dict[object, list[tuple[float, float]]] = {}
    for e in events(out, event):
        held = e["spans"]
        assert isinstance(held, dict)
        if stage in held:
            found.setdefault(e["slide_id"], []).append(tuple(held[stage]))
    return found


def test_one_slide_is_post_processed_while_the_next_is_predicted(run_on_ray: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = run_on_ray(large_fields(tmp_path, 3), out, LoadQuick(BATCH_S), engine_of(1, gpus=True), FAST)
    assert outcome.exit_code == 0
    posts, predictions = spans(out, "region_done", "post"), spans(out, "unit_done", "infer")
    overlaps = [
        (slide, other)
        for slide, regions in posts.items()
        for other, units in predictions.items()
        if slide < other and any(a < d and c < b for a, b in regions for c, d in units)  # type: ignore[operator]
    ]
    say(f"post-processed while another was predicted: {sorted(set(overlaps))}")
    assert overlaps


@pytest.mark.slow
@pytest.mark.parametrize("networks", [1, 2, 4])
def test_networks_are_busy(run_on_ray: Run, tmp_path: Path, networks: int) -> None:
    outcome = run_on_ray(
        large_fields(tmp_path, 5 * networks),
        tmp_path / "out",
        LoadQuick(BATCH_S),
        engine_of(networks, gpus=True, units_at_once=3),
        FAST,
    )
    assert outcome.exit_code == 0 and outcome.model_busy is not None
    say(f"{networks} networks: busy {outcome.model_busy:.3f}")
    assert outcome.model_busy >= 0.9


@pytest.mark.slow
def test_ray_costs_little_beside_a_unit_of_a_second(
    run_on_ray: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first prediction to the last, over the time that the network itself took; on both backends."""
    cohort = large_fields(tmp_path, 6)
    run_on_ray(cohort, tmp_path / "ray", LoadQuick(BATCH_S), engine_of(1, gpus=True, units_at_once=3), FAST)
    runner("local", monkeypatch)(cohort, tmp_path / "local", LoadQuick(BATCH_S), settings=FAST)
    took = {}
    for backend in ("ray", "local"):
        ends = [span for units in spans(tmp_path / backend, "unit_done", "infer").values() for span in units]
        took[backend] = max(b for _, b in ends) - min(a for a, _ in ends)
    ratio = took["ray"] / took["local"]
    say(f"24 units of one second: Ray {took['ray']:.1f} s, local {took['local']:.1f} s, ratio {ratio:.3f}")
    assert ratio <= 1.05


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_is_flat_over_a_long_cohort(run_on_ray: Run, tmp_path: Path) -> None:
    """200 small slides: the driver and the object store hold no more in the last quarter than in the second."""
    import ray

    rng = np.random.default_rng(0)
    names = [f"s{i:03d}" for i in range(200)]
    for name in names:
        Image.fromarray(rng.integers(60, 240, (300, 300, 3), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "cohort.csv").write_text("path,mpp\n" + "".join(f"{name}.png,0.25\n" for name in names))
    out, samples, over = tmp_path / "out", list[tuple[int, int, float]](), threading.Event()

    def store_mib() -> float:
        name = "object_store_memory"
        return (ray.cluster_resources()[name] - ray.available_resources().get(name, 0)) / 2**20

    def watch() -> None:
        driver = psutil.Process(os.getpid())
        while not over.wait(1.0):
            done = sum(1 for _ in out.glob("slides/*/slide.json"))
            samples.append((done, driver.memory_info().rss, store_mib()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    try:
        assert run_on_ray(tmp_path / "cohort.csv", out, LoadQuick(0.05)).exit_code == 0
    finally:
        over.set()
        watcher.join()
    second = [s for s in samples if 50 <= s[0] < 100]
    last = [s for s in samples if s[0] >= 150]
    rss = [float(np.median([s[1] for s in part])) / 2**20 for part in (second, last)]
    store = [max(s[2] for s in part) for part in (second, last)]
    say(
        f"200 slides in {time.monotonic() - started:.0f} s; driver {rss[0]:.0f} → {rss[1]:.0f} MiB; "
        f"object store at most {store[0]:.1f} → {store[1]:.1f} MiB"
    )
    assert rss[1] <= 1.02 * rss[0]
    assert store[1] <= store[0] + 8

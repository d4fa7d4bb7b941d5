"""`--batch auto`: on a GPU a power of two, found in a trial; on a CPU the default."""

from __future__ import annotations

import pytest
import torch

from hover_batch.config import AUTO_BATCH, InferSettings, Runtime, Settings
from hover_batch.model.auto_batch import MAX_BATCH, Trial, doubled
from hover_batch.model.package import find_package
from hover_batch.model.predict import auto_batch, load_predictor, resolve


def card(launch: float, per_tile: float, gb: float, gb_per_tile: float = 0.1) -> Trial:
    """A GPU whose batches take `launch` + n · `per_tile` seconds."""

    def trial(size: int) -> tuple[float, float]:
        share = size * gb_per_tile / gb
        if share > 1:
            raise torch.OutOfMemoryError("out of memory")
        return launch + size * per_tile, share

    return trial


@pytest.mark.parametrize(
    ("trial", "batch"),
    [
        (card(launch=0.010, per_tile=0.001, gb=80), 128),  # twice as many gain 4 %
        (card(launch=0.0, per_tile=0.001, gb=80), 1),
        (card(launch=0.010, per_tile=0.001, gb=8), 32),  # 64 would take 80 % of the memory
        (card(launch=0.010, per_tile=0.001, gb=5), 16),  # 64 would not fit, and 32 take 64 %
        (card(launch=0.010, per_tile=0.001, gb=0.05), 1),
        (card(launch=9.0, per_tile=0.001, gb=8000), MAX_BATCH),
    ],
)
def test_a_batch_is_doubled_until_time_or_memory_ends_it(trial: Trial, batch: int) -> None:
    assert doubled(trial) == batch


def test_differences_of_a_few_percent_do_not_change_the_batch() -> None:
    for slower in (0.98, 0.99, 1.0, 1.01, 1.02):
        assert doubled(card(0.010 * slower, 0.001, 80)) == 128


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_on_a_cpu_auto_is_the_default(runtime: Runtime) -> None:
    settings = Settings.from_dict({"infer": {"batch": "auto", "device": "cpu", "runtime": runtime}})
    assert settings.infer.batch == AUTO_BATCH
    assert resolve(settings.infer) == resolve(InferSettings(device="cpu", runtime=runtime))
    assert load_predictor(find_package("starter"), settings.infer).batch == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_chooses_the_same_batch_again() -> None:
    settings = InferSettings(batch=AUTO_BATCH, device="cuda")
    assert resolve(settings).batch == AUTO_BATCH
    first, second = (auto_batch(find_package("starter"), settings) for _ in range(2))
    assert first == second and first & (first - 1) == 0

"""Training computes in bfloat16 only on processors that support it: torch's emulation is ten times slower."""

from __future__ import annotations

import pytest
import torch

from kd.training.precision import training_autocast


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True, "avx512_bf16": False}, torch.float32)],
)
def test_bfloat16_only_where_the_processor_supports_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    with training_autocast(torch.device("cpu")):
        assert torch.nn.functional.linear(torch.ones(1, 2), torch.ones(3, 2)).dtype == dtype

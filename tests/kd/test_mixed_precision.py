"""Networks are trained in bfloat16 only where the hardware computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kd.training.precision import mixed_precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
    ],
)
def test_bfloat16_only_in_hardware(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    with mixed_precision(torch.device("cpu")):
        assert torch.nn.Conv2d(3, 2, 1)(torch.rand(1, 3, 4, 4)).dtype == expected

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


def test_depthwise_convolutions_are_computed_in_float32_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    image, layers = torch.ones(1, 4, 5, 5), (torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.Conv2d(4, 4, 3))
    with training_autocast(torch.device("cpu")):
        assert [layer(image).dtype for layer in layers] == [torch.float32, torch.bfloat16]
        assert layers[0](layers[1](torch.ones(1, 4, 7, 7))).dtype == torch.float32
    assert layers[1](image).dtype == torch.float32

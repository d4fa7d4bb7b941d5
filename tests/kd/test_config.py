"""Presets give their settings, flags take precedence, and invalid values are refused with the name of the flag."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from hover_batch.errors import InputError
from hover_batch.model.architectures.hovernet import TeacherArch
from kd.training.config import PRESETS, SIDES, TrainConfig

PLACES = {"data": Path("data"), "out": Path("out")}


def test_quick_is_what_the_settings_are_by_default():
    assert TrainConfig.of("quick", **PLACES) == TrainConfig(**PLACES)


def test_the_papers_figures():
    config = TrainConfig.of("paper", **PLACES, teacher=Path("taught"))
    assert (config.optimizer, config.lr, config.betas, config.weight_decay) == ("adam", 1e-4, (0.99, 0.9999), 0)
    assert (config.plateau_patience, config.plateau_factor, config.plateau_delta) == (5, 0.1, 1e-4)
    assert (config.min_lr, config.early_stop) == (1e-6, 10)
    assert (config.encoder, config.loss_shares, config.temperature) == ("mit_b2", (0.5, 0.5), 1)
    assert (config.kl_scale, config.kl_mean, config.class_weights) == ("1/T²", "pixels", True)
    assert (config.teacher_labels, config.dice_over, config.msge_axes) == ("soft", "sum", "own")


def test_where_the_released_code_differs():
    paper, released = (TrainConfig.of(p, **PLACES, teacher=Path("t"), alpha=0.2) for p in ("paper", "released"))
    differing = {f.name for f in fields(paper) if getattr(paper, f.name) != getattr(released, f.name)}
    assert differing == {
        *("preset", "alpha_of", "temperature", "kl_scale", "kl_mean", "dice_over", "msge_axes", "batch", "epochs"),
        *("betas", "clip", "plateau_delta", "plateau_relative", "min_lr", "early_stop", "augmentation"),
    }
    assert (released.temperature, released.batch, released.epochs) == (3, 64, 240)
    assert (released.betas, released.plateau_delta, released.min_lr) == ((0.9, 0.999), 1e-3, 1e-7)
    assert (paper.loss_shares, released.loss_shares) == ((0.2, 0.8), (0.8, 0.2))


def test_flags_go_before_the_preset_and_none_is_no_flag():
    config = TrainConfig.of("paper", **PLACES, alpha=1.0, encoder="mit_b0", lr=None, steps=30)
    assert (config.alpha, config.encoder, config.lr, config.steps) == (1, "mit_b0", 1e-4, 30)


def test_with_a_teacher_quick_distils_by_half():
    assert TrainConfig(**PLACES).loss_shares == (1, 0)
    assert TrainConfig(**PLACES, teacher=Path("taught")).loss_shares == (0.5, 0.5)


@pytest.mark.parametrize(
    ("preset", "given", "message"),
    [
        ("best", {}, "--preset best: unknown; give one of quick, starter, starter-open, paper, released"),
        ("paper", {}, "--alpha 1 to train without"),
        ("released", {}, "--alpha 0 to train without"),
        ("quick", {"alpha": 0.5}, "kd teach"),
        ("quick", {"alpha": 1.5}, "--alpha 1.5"),
        ("quick", {"alpha": float("nan")}, "--alpha nan"),
        ("quick", {"temperature": 0.0}, "--temperature 0"),
        ("quick", {"model": "resnet"}, "--model resnet: unknown; give one of unet, hovernet-fast"),
        ("quick", {"size": 100}, "--size 100: must be a multiple of 32"),
        ("quick", {"model": "hovernet-original", "size": 256}, "--size 256: must be 6 more than a multiple of 8"),
        ("quick", {"model": "hovernet-fast", "size": 120}, "--size 120: .* at least 128"),
        ("quick", {"model": "hovernet-fast", "width": 12}, "--width 12"),
        ("quick", {"steps": 0}, "--steps 0"),
        ("quick", {"steps": 10**23}, "--steps 1.*: must be at most 1000000000"),
        ("quick", {"encoder": "tu-hf-hub:x/y"}, "--encoder 'tu-hf-hub:x/y': must be a name"),
        ("quick", {"encoder": ""}, "--encoder '': must be a name"),
        ("quick", {"sources": {"consep": 1e308, "tnbc": 1e308}}, "--source"),
        ("quick", {"temperature": 1e-300}, "--temperature 1e-300"),
        ("quick", {"batch": 2**31}, "--batch 2147483648: must be at most 4096"),
        ("quick", {"size": 2**31}, "--size 2147483648: must be at most 4096"),
        ("quick", {"threads": 10**23}, "--threads 1.*: must be at most 1024"),
        ("quick", {"np_weight": 1e300}, "--np-weight 1e.300: must be at most 1000000"),
        ("quick", {"epoch_steps": -1}, "--epoch-steps -1"),
        ("quick", {"sources": {}}, "--source"),
        ("quick", {"sources": {"consep": float("nan")}}, "--source"),
        ("quick", {"temperature": float("inf")}, "--temperature inf"),
        ("quick", {"seed": -1}, "--seed -1"),
        ("quick", {"seed": 1 << 32}, "--seed 4294967296"),
        ("quick", {"val_folds": ("train",)}, "--val-fold train"),
        ("quick", {"init": Path("a"), "encoder_weights": "b.pth"}, "--encoder-weights"),
    ],
)
def test_what_does_not_fit_names_the_flag(preset, given, message):
    with pytest.raises(InputError, match=message):
        TrainConfig.of(preset, **PLACES, **given)


@pytest.mark.parametrize("model", [m for m in SIDES if m.startswith("hovernet-")])
def test_sides_are_those_that_hovernet_takes(model):
    arch = TeacherArch(model.removeprefix("hovernet-"), 5)
    default, smallest, multiple, excess = SIDES[model]
    assert (multiple, excess) == (8, arch.excess)
    assert default % 8 == smallest % 8 == excess
    assert default - arch.shrink == {"fast": 164, "original": 80}[arch.form]  # as published
    assert smallest - arch.shrink >= 32


def test_json_holds_what_decides_the_weights_and_no_paths():
    config = TrainConfig.of("paper", data=Path("/a/data"), out=Path("/a/out"), teacher=Path("/a/taught"))
    held = config.to_json()
    assert "/a" not in str(held) and held["alpha"] == 0.5 and held["betas"] == [0.99, 0.9999]
    assert set(PRESETS["paper"]) <= set(held)

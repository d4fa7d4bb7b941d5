"""Log rows by step, columns that are added later, and only the CSV if TensorBoard is not installed."""

from __future__ import annotations

import sys

import pytest

from kd.training.logs import EVENTS, LOG, Log, read_log


def test_columns_may_come_late_and_rows_of_an_interrupted_run_go(tmp_path):
    log = Log(tmp_path)
    log.write({"step": 4, "loss": 2.5})
    log.write({"step": 8, "loss": 2.0, "tp_ce": 1.0})
    log.write({"step": 12, "loss": 1.0, "tp_ce": 0.5})
    log.write({"step": 8, "loss": 1.5, "tp_ce": 1.0})  # resumed at 4, this time with other luck
    assert read_log(tmp_path / LOG) == [
        {"step": "4", "loss": "2.5"},
        {"step": "8", "loss": "1.5", "tp_ce": "1"},
    ]


def test_how_far_it_is_is_said_now_and_then(tmp_path, monkeypatch, capsys):
    log = Log(tmp_path)
    log.step(1, 10, 30)
    monkeypatch.setattr("kd.training.logs.PRINT_EVERY_S", 0)
    log.step(2, 10, 30)
    assert capsys.readouterr().out == "  step 2 of 10, 30 s each, 4 min left\n"


def test_tensorboard_gets_the_same(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path)
    for step in (4, 8):
        log.write({"step": step, "loss": 10.0 / step, "val_loss": 1.0})
    read = EventAccumulator(str(tmp_path / EVENTS))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"training/loss", "validation/val_loss"}
    assert [(e.step, e.value) for e in read.Scalars("training/loss")] == [(4, 2.5), (8, 1.25)]


def test_without_tensorboard_the_csv_is_written_and_it_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = Log(tmp_path)
    for step in (4, 8):
        log.write({"step": step, "loss": 1.0})
    assert capsys.readouterr().out.count("tensorboard is not installed") == 1
    assert len(read_log(tmp_path / LOG)) == 2
    assert not (tmp_path / EVENTS).exists()


@pytest.mark.parametrize("content", [b"\xff\xfes", b"step;loss\n4;2\n", b"step\nx\n", b"step\nnan\n"])
def test_a_damaged_log_is_kept_aside_and_the_training_goes_on(tmp_path, monkeypatch, capsys, content):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / LOG).write_bytes(content)
    Log(tmp_path).write({"step": 4, "loss": 2.5})
    assert read_log(tmp_path / LOG) == [{"step": "4", "loss": "2.5"}]
    assert (tmp_path / "damaged_log.csv").read_bytes() == content
    assert "log.csv is not a log of kd train; renamed to damaged_log.csv" in capsys.readouterr().out

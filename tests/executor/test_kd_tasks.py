"""kd on Ray: a teacher's outputs equal those computed in one process."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import kd.teaching.teach
from hover_batch.config import EngineSettings
from hover_batch.executor.resources import Node, Resources
from hover_batch.model.architectures.hovernet import TeacherArch, build_teacher
from hover_batch.model.card import Card
from hover_batch.model.package import find_package, save_package
from hover_batch.taxonomy import CONSEP

CARD = Card(
    name="professor", architecture="hovernet-fast", encoder="", taxonomy=CONSEP, mpp=0.25, tile_in=160, tile_out=64,
    sobel=find_package("starter").card.sobel, licence="none",
)  # fmt: skip


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two images of noise, and a teacher in the same folder."""
    rows = []
    for i in range(2):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8))
        cv2.imwrite(str(tmp_path / f"{i}_labels.png"), np.zeros((64, 64), np.uint16))
        rows.append((f"image {i}", f"{i}.png", f"{i}_labels.png", "", "tnbc", "", "train"))
    with (tmp_path / "dataset.csv").open("w", newline="") as f:
        csv.writer(f).writerows([("sample_id", "image", "labels", "types", "source", "group", "split"), *rows])
    torch.manual_seed(0)
    network = build_teacher(TeacherArch("fast", len(CONSEP.classes), 8))
    save_package(tmp_path / "professor.safetensors", network, CARD, half=False)
    return tmp_path


def test_both_backends_teach_the_same(
    ray_cluster: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tests' cluster is up; the machines of a run would start one more.
    there = Resources((Node(2, 0, 1 << 33),))
    monkeypatch.setattr(kd.teaching.teach, "task_resources", lambda engine, log: contextlib.nullcontext(there))
    monkeypatch.setattr(kd.teaching.teach, "TILES_A_TASK", 1)
    kept = {}
    for backend in ("local", "ray"):
        out = tmp_path / backend
        teacher = str(images / "professor.safetensors")
        kd.teaching.teach.teach(
            images, teacher, out, ["train"], engine=EngineSettings(backend=backend, cpus=2), notify=lambda line: None
        )
        files = [p for p in out.rglob("*") if p.is_file() and p.name != ".lock"]  # the lock file names its process
        kept[backend] = {str(p.relative_to(out)): p.read_bytes() for p in files}
    assert len(kept["ray"]) == 5
    assert kept["local"] == kept["ray"]

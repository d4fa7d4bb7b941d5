"""Paths of a run's results."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hover_batch.cohort.layout import Format, PathBelow, RunLayout, SlideLayout
from hover_batch.errors import InputError


@given(st.text(max_size=40) | st.sampled_from(["..", ".", "", "../x", "/etc", "a/../../b", "a\\..\\b"]))
def test_nothing_leaves_the_slide_s_folder(slide_id: str) -> None:
    root = Path("/out")
    try:
        slide = RunLayout(root).slide(slide_id)
    except InputError as error:
        assert repr(slide_id) in str(error)
        return
    assert slide.folder.resolve().parent == root / "slides"
    assert all(path.parent == slide.folder for path in slide.removal_order)


def test_each_path_has_its_own_name_and_is_removed(tmp_path: Path) -> None:
    slide = SlideLayout(tmp_path, "a")
    named = {name for name, kind in vars(SlideLayout).items() if isinstance(kind, property | PathBelow)}
    paths = {getattr(slide, name) for name in named - {"folder", "kept", "removal_order", "sample"}}
    paths |= {slide.sample.working, *map(slide.exported, Format)}
    assert paths == set(slide.removal_order) and len(paths) == len(slide.removal_order)
    assert set(slide.kept) < paths and slide.kept[-1] == slide.slide_json
    assert slide.marker(3, 14).parent == slide.markers and slide.part(3, 14).parent == slide.parts
    assert slide.marker(1, 11) != slide.marker(11, 1)


def test_a_relative_root_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layout = RunLayout(Path("out"))
    monkeypatch.chdir("/")
    assert layout.slide("a").slide_json == tmp_path / "out" / "slides" / "a" / "slide.json"

"""Valid slide ids, and suggestions for others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hover_batch.cohort.slide_id import fault_in, fold, suggest

ANY_TEXT = st.text(max_size=200)
AWKWARD = st.sampled_from(
    ["", ".", "..", "../x", "/", "con", "NUL.svs", "LPT1.a.b", "x" * 300, "a.", "-", "é", "切片", "a\n"]
)


@pytest.mark.parametrize("slide_id", ["a", "7", "TCGA-V5-A7RE-01Z-00-DX1.1D6F3D94", "a.ome", "console", "a-_"])
def test_names_of_real_slides_fit(slide_id: str) -> None:
    assert fault_in(slide_id) is None


@pytest.mark.parametrize(
    "slide_id",
    [
        "",
        "../x",
        "a/b",
        "a\\b",
        ".hidden",
        "-rf",
        "_a",
        "a b",
        "a\n",
        "é",
        "a.",
        "..",
        "con",
        "Aux.1",
        "com9",
        "x" * 129,
    ],
)
def test_names_that_no_folder_should_have_do_not_fit(slide_id: str) -> None:
    assert fault_in(slide_id)


@given(ANY_TEXT | AWKWARD, st.sets(ANY_TEXT.map(fold) | st.sampled_from(["slide", "slide-2", "x", "a"]), max_size=20))
def test_a_suggestion_always_fits_and_is_free(text: str, taken: set[str]) -> None:
    suggestion = suggest(text, taken)
    assert fault_in(suggestion) is None
    assert fold(suggestion) not in taken


@given(ANY_TEXT)
def test_suggestions_never_repeat(text: str) -> None:
    taken: set[str] = set()
    for _ in range(12):
        taken.add(fold(suggest(text, taken)))
    assert len(taken) == 12


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [("../x", "x"), ("Fall 12 (HE)", "Fall-12-HE"), ("Präparat", "Praparat"), ("切片", "slide"), ("aux", "slide-aux")],
)
def test_a_suggestion_stays_near_the_name(text: str, suggestion: str) -> None:
    assert suggest(text, set()) == suggestion

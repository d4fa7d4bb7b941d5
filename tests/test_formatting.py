"""Text in messages: counts, durations, lists, and the progress of long work."""

from __future__ import annotations

import sys

import pytest

from hover_batch import progress
from hover_batch.formatting import LISTED, counted, duration, encoding_fault, listed
from hover_batch.progress import ProgressCounter


def test_counts_have_their_plural() -> None:
    assert [counted(n, "slide") for n in (0, 1, 2, 1200)] == ["0 slides", "1 slide", "2 slides", "1,200 slides"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (3.44, "3.4 s"),
        (9.96, "10 s"),
        (89.4, "89 s"),
        (90, "1.5 min"),
        (600, "10 min"),
        (5400, "1.5 h"),
        (172_800, "2 days"),
        (8_640_000, "100 days"),
    ],
)
def test_durations_have_two_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_long_lists_are_cut() -> None:
    names = [f"s{number}" for number in range(LISTED + 1)]
    assert listed(names[:2]) == "s0, s1"
    assert listed(names) == ", ".join(names[:LISTED]) + ", …"


def test_the_rate_leaves_out_what_was_done_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    counter = ProgressCounter("tiles")
    counter.expect(100, before=40)
    assert counter.line == "tiles 40/100"
    now = 10.0
    counter.advance(20)
    assert (counter.done_now, counter.rate) == (20, 2.0)
    assert counter.line == "tiles 60/100, 2.0/s, 20 s left"
    counter.advance(40)
    assert counter.line == "tiles 100/100"


def test_names_that_are_not_utf8_or_do_not_fit_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoding_fault("é/a b") is None
    assert encoding_fault("\udcff") == "its name is not valid UTF-8; rename it"
    with monkeypatch.context() as patch:  # what Python does with the bytes of é if LC_ALL=C is enforced
        patch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
        assert "encoding of this environment, ascii; export LC_ALL=C.UTF-8" in str(encoding_fault("\udcc3\udca9"))

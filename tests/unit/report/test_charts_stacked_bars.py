"""Stacked bars of shares: as long as D, in proportion, and readable without colour."""

from __future__ import annotations

from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnprobe.records import SOURCES, Shares
from bnprobe.report.charts import Scale, bar, full_length, length, segments
from bnprobe.report.page import Page
from bnprobe.stats.theory import mismatch_iid

SHARE = st.floats(-0.05, 2.0)
SHARES = st.builds(
    Shares,
    small_batch=SHARE,
    composition=st.none() | SHARE,
    lag=SHARE,
    dropout=SHARE,
    propagation=SHARE,
    data_shift=st.none() | SHARE,
)


def shares(**values: float | None) -> Shares:
    """Shares that are 0 unless given."""
    return Shares(**{source.field: 0.0 for source in SOURCES} | values)


def read(line: str) -> dict[str, int]:
    """The cells of each letter's segment, read from the characters alone."""
    cells: dict[str, int] = {}
    letter = ""
    for char in line.rstrip("»> │"):
        letter = char if char.isalpha() else letter
        cells[letter] = cells.get(letter, 0) + 1
    return cells


@given(found=SHARES, width=st.integers(16, 80), full=st.floats(0.05, 20))
def test_segments_are_in_proportion_and_in_order(found: Shares, width: int, full: float) -> None:
    scale = Scale(full, width)
    made = segments(found, scale)
    total = length(found)
    cut = total > full * (1 + 1e-9)
    room = width - 1 if cut else round(width * total / full)
    assert sum(cells for _, cells in made) == room
    assert [source.letter for source, _ in made] == sorted((source.letter for source, _ in made), key="scldpx".index)
    by_field = {source.field: cells for source, cells in made}
    for source in SOURCES:
        exact = max(source.of(found) or 0.0, 0.0) * room / total if total else 0.0
        assert abs(by_field.get(source.field, 0) - exact) < 1


@given(found=SHARES, width=st.integers(16, 80), unicode=st.booleans())
def test_a_bar_reads_without_colour(found: Shares, width: int, unicode: bool) -> None:
    scale = Scale(max(length(found), 0.1), width)
    line = bar(found, scale, None, Page(80, unicode)).plain
    assert len(line) == width
    assert unicode or line.isascii()
    assert read(line) == {source.letter: cells for source, cells in segments(found, scale)}


def test_a_share_below_zero_draws_nothing() -> None:
    found = shares(small_batch=0.5, lag=-0.2, dropout=0.5)
    assert bar(found, Scale(1.0, 20), None, Page(80, unicode=True)).plain == "s━━━━━━━━━d━━━━━━━━━"


def test_the_largest_share_is_drawn_where_there_is_one_cell_only() -> None:
    found = shares(small_batch=0.02, composition=0.0, lag=0.03, propagation=0.01)
    assert bar(found, Scale(1.0, 16), None, Page(80, unicode=True)).plain.rstrip() == "l"


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (shares(small_batch=0.01), "s    │"),
        (shares(small_batch=0.12), "s━━━━┿━━━━━━━━"),
        (shares(small_batch=0.05, lag=0.07), "s━━━━━l┿━━━━━━"),
        (shares(small_batch=0.05, lag=0.0086), "s━━━━━l"),
    ],
)
def test_the_limit_is_marked_in_every_bar_and_covers_no_letter(found: Shares, line: str) -> None:
    # 14 cells are D = 0.12; the limit of n_eq 36, D = 0.042, is 4.9 cells, of n_eq 28 6.3 cells.
    limit = mismatch_iid(28 if "l" in line else 36)
    assert bar(found, Scale(0.12, 14), limit, Page(80, unicode=True)).plain.rstrip() == line


def test_what_comes_on_top_of_the_mismatch_is_thin_and_does_not_cross_the_limit() -> None:
    found = shares(small_batch=0.04, data_shift=0.06)
    assert bar(found, Scale(0.12, 12), 0.07, Page(80, unicode=True)).plain == "s━━━x──│──  "
    assert bar(found, Scale(0.12, 12), 0.07, Page(80, unicode=False)).plain == "s===x--|--  "


def test_a_bar_beyond_the_scale_is_cut_with_a_mark_and_keeps_its_proportions() -> None:
    line = bar(shares(small_batch=10.0, lag=30.0), Scale(0.5, 21), 0.047, Page(80, unicode=False)).plain
    assert line == "s====l==============>"


@pytest.mark.parametrize(
    ("lengths", "full"),
    [
        ([0.2, 0.9, 0.5], 0.9),
        ([0.2, 0.9, 38.9], 0.9),
        ([0.2, 0.3, 38.9, 37.0], 38.9),
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 38.9, 37.0], 0.6),
        ([38.9], 38.9),
        ([0.001, 0.002], 1.5 * mismatch_iid(32)),
        ([], 1.5 * mismatch_iid(32)),
    ],
)
def test_the_scale_is_the_longest_bar_unless_that_would_squash_the_others(lengths: list[float], full: float) -> None:
    assert full_length(lengths, [mismatch_iid(32)]) == pytest.approx(full)


@pytest.mark.parametrize("limit", [1e-9, 0.047, 2.0])
def test_the_mark_stands_at_the_limit(limit: float) -> None:
    line = bar(shares(), Scale(2.5 * limit, 50), limit, Page(80, unicode=True)).plain
    assert line.index("│") == 20


def test_the_sources_are_the_shares_and_their_letters_differ() -> None:
    assert [source.field for source in SOURCES] == list(Shares.__dataclass_fields__)
    assert len({source.letter for source in SOURCES}) == len(astuple(shares()))

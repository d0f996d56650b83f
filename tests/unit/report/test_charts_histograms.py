"""Histograms in characters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fabricated_parts import R_EDGES, histogram

from bnprobe.records import Histogram
from bnprobe.report import figures
from bnprobe.report.charts import D_CHART, R_CHART, ruler
from bnprobe.report.charts import histogram as draw
from bnprobe.report.page import INFINITE, LEVELS, UNMEASURED


def heights(text: str, half: int) -> list[int]:
    return [LEVELS.index(char) for char in text[:half] + text[half + 1 :]]


def test_values_stand_where_the_ruler_says() -> None:
    assert draw(Histogram((0.24, 0.26), (9,)), R_CHART, 5) == "█    │     "
    assert draw(Histogram((3.9, 4.1), (9,)), R_CHART, 5) == "     │    █"
    assert draw(Histogram((0.9, 1 / 0.9), (9,)), R_CHART, 5) == "    █│█    "
    assert ruler(R_CHART, 5) == "1/4  1    4"
    assert ruler(D_CHART, 5) == "-5   0    5"


def test_values_beyond_the_axis_are_in_its_outermost_cells() -> None:
    assert draw(Histogram((-100.0, -50.0), (3,)), D_CHART, 4) == "█   │    "
    assert draw(Histogram((50.0, 1e30), (3,)), D_CHART, 4) == "    │   █"
    assert draw(Histogram((0.0, 1e-9), (3,)), R_CHART, 4) == "█   │    "


def test_a_bin_that_has_no_width_in_the_picture_counts() -> None:
    assert draw(Histogram((2.0, math.nextafter(2.0, 3.0)), (4,)), R_CHART, 5) == "     │  █  "


def test_an_empty_histogram_draws_only_the_centre() -> None:
    assert draw(Histogram((0.5, 1.0, 2.0), (0, 0)), R_CHART, 3) == "   │   "


@pytest.mark.parametrize("half", [4, 5, 8])
def test_the_picture_does_not_depend_on_the_bins(half: int) -> None:
    values = np.random.default_rng(0).normal(0.4, 0.8, 100_000)
    coarse, fine = (
        histogram(values, tuple(np.sinh(np.linspace(-4.2, 4.2, number)).tolist())) for number in (121, 1001)
    )
    pairs = zip(heights(draw(coarse, D_CHART, half), half), heights(draw(fine, D_CHART, half), half), strict=True)
    assert max(abs(one - other) for one, other in pairs) <= 1


def test_heights_are_shares_of_the_largest_cell() -> None:
    random = np.random.default_rng(1)
    r = np.sqrt(random.chisquare(1, 50_000) / 2)
    half = 5
    edges = np.exp(np.linspace(-np.log(4), np.log(4), 2 * half + 1))
    edges[0], edges[-1] = 0, np.inf
    counts, _ = np.histogram(r, edges)
    expected = np.where(counts > 0.001 * counts.sum(), np.ceil(8 * counts / counts.max()), 0)
    drawn = heights(draw(histogram(r, R_EDGES), R_CHART, half), half)
    assert np.abs(expected - drawn).max() <= 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "∞"),
        (1.0, "1.0"),
        (2.04, "2.0"),
        (31.94, "31.9"),
        (128.4, "128"),
        (9999, "9999"),
        (10_000, ">10k"),
    ],
)
def test_equivalent_batch_sizes(value: float | None, text: str) -> None:
    assert figures.equivalent_batch_size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (4e-4, "<0.001"),
        (0.8716, "0.872"),
        (2.254, "2.25"),
        (38.92, "38.9"),
        (387.2, "387"),
        (2e6, "2e+06"),
    ],
)
def test_mismatches(value: float, text: str) -> None:
    assert figures.mismatch(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0%"), (2e-4, "<0.1%"), (0.034, "3.4%"), (0.363, "36%"), (1, "100%")])
def test_percentages(value: float, text: str) -> None:
    assert figures.percent(value) == text


def test_decimal_points_stand_in_line_and_signs_stand_flush_right() -> None:
    found = figures.points_in_line(["2.0", "128", ">10k", INFINITE, UNMEASURED])
    assert found == ["2.0", "128  ", ">10k  ", INFINITE, UNMEASURED]

"""Intervals: the formula, the ends, and how often they hold what they should."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from bnprobe.measure.forward_pass import Recorded
from bnprobe.measure.layers import find_layers
from bnprobe.measure.path_evidence import PathEvidence
from bnprobe.stats.intervals import Sums, mean_interval
from bnprobe.stats.theory import mismatch_iid, standing


def sums_of(values: np.ndarray, parts: np.ndarray | None = None) -> Sums:
    powers = [float((values**power).sum()) for power in (1, 2, 3)]
    return Sums(len(values), *powers, None if parts is None else sums_of(parts))


@given(st.lists(st.floats(0.01, 100.0), min_size=2, max_size=40))
def test_the_interval_is_students_on_a_logarithmic_scale_or_reaches_further_up(values: list[float]) -> None:
    figures = np.array(values)
    low, high = mean_interval(sums_of(figures))
    half = stats.t.ppf(0.975, len(values) - 1) * figures.std(ddof=1) / math.sqrt(len(values))
    factor = math.exp(half / figures.mean()) if half else 1.0
    assert low == pytest.approx(figures.mean() / factor, rel=1e-3, abs=1e-5)
    assert high is None or high >= figures.mean() * factor * (1 - 1e-3) - 1e-5


def test_the_upper_end_is_halls_where_that_is_higher() -> None:
    figures = np.array([1.0] * 8 + [2.0] * 6 + [4.0, 5.0])
    low, high = mean_interval(sums_of(figures))
    skewness, t = stats.skew(figures) / 4, stats.t.ppf(0.975, 15)
    ends = figures.mean() - 3 / skewness * (np.cbrt(1 - skewness * (t + skewness / 6)) - 1) * stats.sem(figures)
    assert high == pytest.approx(max(ends, figures.mean() ** 2 / low))
    assert ends > figures.mean() ** 2 / low


def test_no_mismatch_at_all_is_certain() -> None:
    assert mean_interval(Sums(16, 0.0, 0.0, 0.0)) == (0.0, 0.0)


def test_one_batch_says_nothing() -> None:
    assert mean_interval(Sums(1, 0.3, 0.09, 0.027)) == (0.0, None)


def test_rounding_cannot_make_the_spread_imaginary() -> None:
    low, high = mean_interval(Sums(3, 0.3, 0.03 - 1e-18, 0.003))
    assert low <= 0.1 <= high
    assert high - low < 1e-6


def test_sums_are_those_of_numpy() -> None:
    values = np.random.default_rng(1).lognormal(size=50)
    sums = sums_of(values[:20]) + sums_of(values[20:])
    assert sums.mean == pytest.approx(values.mean())
    assert sums.variance == pytest.approx(values.var(ddof=1))
    assert sums.skewness == pytest.approx(stats.skew(values) / math.sqrt(50))


def test_the_tail_is_that_of_single_samples_in_proportion_to_what_they_explain() -> None:
    generator = np.random.default_rng(2)
    parts = generator.lognormal(0, 1.5, (16, 8)) / 64
    figures = parts.sum(1)
    alone = sums_of(figures, parts.ravel())
    # The figures are the sums of the parts, so that these explain all of their variance, to chance.
    explained = min(1.0, math.sqrt(128 * parts.var(ddof=1) / (16 * figures.var(ddof=1))))
    assert alone.tail == pytest.approx(stats.skew(parts, None) / math.sqrt(128) * explained)
    other = sums_of(figures + generator.normal(5, 20 * figures.std(), 16).clip(0), parts.ravel())
    assert other.tail < alone.tail / 5


@pytest.mark.parametrize(
    ("name", "share"),
    [("gauss", (0.0, 0.05)), ("lognormal", (0.85, 1.0)), ("t3", (0.85, 1.0)), ("pareto", (0.9, 1.0))],
)
def test_heavy_tails_are_told_from_gaussian_data(name: str, share: tuple[float, float]) -> None:
    """What 16 micro-batches of 32 samples add to D: the squares of their values, averaged over 8 channels."""
    generator = np.random.default_rng(3)
    draws = {
        "gauss": lambda: generator.normal(size=(512, 8)),
        "lognormal": lambda: generator.lognormal(0, 1.2, (512, 8)),
        "t3": lambda: generator.standard_t(3, (512, 8)),
        "pareto": lambda: generator.pareto(1.5, (512, 8)),
    }
    found = []
    for _ in range(100):
        x = draws[name]()
        batches = x.reshape(16, 32, 8)
        d, v = batches.mean(1) - x.mean(0), batches.var(1) / x.var(0)
        mismatch = (d**2 / x.var(0) + (np.sqrt(v) - 1) ** 2).mean(1)
        z = (x - x.mean(0)) ** 2 / x.var(0)
        found.append(sums_of(mismatch, (z + (z - 1) ** 2 / 4).mean(1) / 32**2).heavy_tailed)
    assert share[0] <= np.mean(found) <= share[1]


def test_a_heavy_tail_leaves_the_upper_end_open_and_the_layer_undecided_or_flagged() -> None:
    parts = np.full(256, 1e-4)
    parts[7] = 0.03
    sums = sums_of(parts.reshape(16, 16).sum(1), parts)
    low, high = mean_interval(sums)
    assert sums.heavy_tailed
    assert high is None
    assert 0 < low < sums.mean
    assert standing([(low, high)], 0.05) == "undecided"
    assert standing([(low, high)], low / 2) == "flagged"
    assert not replace(sums, sampled=0.9).heavy_tailed  # little of the data is left


@pytest.mark.parametrize("scale", [1e-160, 1e160, math.inf, math.nan])
def test_figures_of_any_size_give_an_interval(scale: float) -> None:
    with np.errstate(all="ignore"):
        figures = np.array([1.0, 2.0, 4.0]) * scale
        low, high = mean_interval(sums_of(figures, figures))
    assert not low > figures.mean()
    assert high is None or not high < figures.mean()


@pytest.mark.parametrize(
    ("intervals", "expected"),
    [
        ([(0.1, 0.2)], "flagged"),
        ([(0.01, 0.02), (0.1, None)], "flagged"),
        ([(0.0, None)], "undecided"),
        ([(0.04, 0.06)], "undecided"),
        ([(0.01, 0.02), (0.04, 0.06)], "undecided"),
        ([(0.01, 0.02), (0.0, 0.05)], "clean"),
        ([(0.05, 0.05)], "clean"),
        ([], "clean"),
    ],
)
def test_standing(intervals: list[tuple[float, float | None]], expected: str) -> None:
    assert standing(intervals, 0.05) == expected


@pytest.mark.parametrize("channels", [8, 64])
@pytest.mark.parametrize("n", [4, 32])
def test_the_interval_covers_the_truth_as_often_as_it_says(channels: int, n: int) -> None:
    """300 scans of 16 micro-batches of i.i.d. Gaussian values, n per channel, with exact running statistics."""
    repeats, batches = 300, 16
    generator = np.random.default_rng(channels + n)
    shape = (repeats, batches, channels)
    means = torch.from_numpy(generator.normal(0, 1 / math.sqrt(n), shape))
    variances = torch.from_numpy(generator.chisquare(n - 1, shape) / n)
    layers = find_layers(nn.BatchNorm1d(channels, eps=1e-12), lambda name: True).layers
    truth, covered = mismatch_iid(n), 0
    for mean, variance in zip(means, variances, strict=True):
        path = PathEvidence("train", 4)
        path.add({(0, 0): Recorded(mean, variance, unit=4, values=n, by_batch=True, bytes=0)}, layers)
        sums = path.mismatch((0, 0))
        low, high = mean_interval(sums)
        covered += low <= truth <= high
    assert 0.90 <= covered / repeats <= 0.98

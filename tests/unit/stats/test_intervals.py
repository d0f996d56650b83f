"""Intervals: the formula, the ends, and how often they hold what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from bnprobe.measure.evidence import PathEvidence
from bnprobe.measure.hooks import Recorded
from bnprobe.measure.layers import find_layers
from bnprobe.stats.intervals import mean_interval
from bnprobe.stats.theory import mismatch_iid, standing


@given(st.lists(st.floats(0.01, 100.0), min_size=2, max_size=40))
def test_the_interval_is_students_on_a_logarithmic_scale(values: list[float]) -> None:
    figures = np.array(values)
    low, high = mean_interval(len(values), figures.sum(), (figures**2).sum())
    half = stats.t.ppf(0.975, len(values) - 1) * figures.std(ddof=1) / math.sqrt(len(values))
    factor = math.exp(half / figures.mean()) if half else 1.0
    assert low == pytest.approx(figures.mean() / factor, rel=1e-3, abs=1e-5)
    assert high == pytest.approx(figures.mean() * factor, rel=1e-3, abs=1e-5)


def test_no_mismatch_at_all_is_certain() -> None:
    assert mean_interval(16, 0.0, 0.0) == (0.0, 0.0)


def test_one_batch_says_nothing() -> None:
    assert mean_interval(1, 0.3, 0.09) == (0.0, None)


def test_rounding_cannot_make_the_spread_imaginary() -> None:
    low, high = mean_interval(3, 0.3, 0.03 - 1e-18)
    assert low <= 0.1 <= high
    assert high - low < 1e-6


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
        low, high = mean_interval(sums.count, sums.total, sums.square)
        covered += low <= truth <= high
    assert 0.90 <= covered / repeats <= 0.98

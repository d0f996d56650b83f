"""The jackknife over replicates, against the definition and against chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bnprobe.stats.intervals import jackknife, leave_one_out


def squared_mean(values: torch.Tensor, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The square of a mean: biased upwards by variance / n. From all values, and without each group."""
    counts = torch.bincount(groups).double()
    sums = torch.zeros_like(counts).index_add_(0, groups, values)
    return (leave_one_out(sums) / leave_one_out(counts)).square(), counts


def test_equal_groups_give_quenouilles_and_tukeys_formulas() -> None:
    values = torch.randn(24, dtype=torch.float64) + 1
    estimates, counts = squared_mean(values, torch.arange(24) % 6)
    found = jackknife(estimates, counts)
    whole, deleted = estimates[0], estimates[1:]
    assert found.value == pytest.approx(float(6 * whole - 5 * deleted.mean()))
    assert found.variance == pytest.approx(float(5 / 6 * (deleted - deleted.mean()).square().sum()))
    assert found.degrees == 5
    assert found.bias == pytest.approx(float(whole) - found.value)


def test_the_mean_itself_has_no_bias_and_its_textbook_variance() -> None:
    values = torch.randn(16, dtype=torch.float64)
    found = jackknife(leave_one_out(values) / leave_one_out(torch.ones(16, dtype=torch.float64)), torch.ones(16))
    assert found.bias == pytest.approx(0, abs=1e-12)
    assert found.variance == pytest.approx(float(values.var() / 16))


def test_intervals_cover_the_truth_where_the_plain_figure_is_biased() -> None:
    generator = torch.Generator().manual_seed(1)
    hits, plain, corrected = 0, [], []
    for _ in range(600):
        values = torch.randn(40, generator=generator, dtype=torch.float64) + 1
        estimates, counts = squared_mean(values, torch.arange(40) % 16)  # groups of 2 and of 3
        found = jackknife(estimates, counts)
        low, high = found.interval()
        hits += low <= 1 <= high
        plain.append(float(estimates[0]))
        corrected.append(found.value)
    assert np.mean(plain) - np.mean(corrected) == pytest.approx(1 / 40, abs=0.002)
    assert abs(np.mean(corrected) - 1) < 0.03
    assert 0.93 <= hits / 600 <= 0.98


def test_empty_replicates_do_not_count() -> None:
    values = torch.randn(5, dtype=torch.float64)
    counts = torch.tensor([1.0] * 5 + [0.0] * 11, dtype=torch.float64)
    sums = torch.cat([values, torch.zeros(11, dtype=torch.float64)])
    found = jackknife(leave_one_out(sums) / leave_one_out(counts), counts)
    assert found.degrees == 4
    assert found.value == pytest.approx(float(values.mean()))
    assert found.variance == pytest.approx(float(values.var() / 5))


def test_one_replicate_says_nothing_about_the_spread() -> None:
    found = jackknife(torch.tensor([2.0, math.nan]), torch.tensor([1.0]))
    assert (found.value, found.degrees, found.interval()) == (2.0, 0, None)


def test_extra_variance_widens_the_interval() -> None:
    values = torch.randn(16, dtype=torch.float64)
    found = jackknife(leave_one_out(values) / leave_one_out(torch.ones(16, dtype=torch.float64)), torch.ones(16))
    (low, high), (wide_low, wide_high) = found.interval(), found.interval(found.variance)
    assert wide_high - wide_low == pytest.approx(math.sqrt(2) * (high - low))

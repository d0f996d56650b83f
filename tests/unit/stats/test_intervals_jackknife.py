"""The jackknife over replicates, against the definition and against chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bnprobe.stats.intervals import jackknife, jackknife_each, leave_one_out


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


def test_an_independent_error_widens_the_interval_and_an_excess_narrows_it() -> None:
    values = torch.randn(16, dtype=torch.float64)
    found = jackknife(leave_one_out(values) / leave_one_out(torch.ones(16, dtype=torch.float64)), torch.ones(16))
    (low, high), (wide_low, wide_high) = found.interval(), found.with_noise(found.variance).interval()
    assert wide_high - wide_low == pytest.approx(math.sqrt(2) * (high - low))
    assert found.with_noise(0.0, found.variance / 2).variance == pytest.approx(found.variance / 2)
    assert found.with_noise(0.0, 2 * found.variance).variance == pytest.approx(0.1 * found.variance)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 1.0])
def test_a_finite_data_set_of_which_a_part_was_read(part: float) -> None:
    """The square of a mean of values drawn without replacement from 400, against the set's own mean."""
    generator = torch.Generator().manual_seed(4)
    data = torch.randn(400, generator=generator, dtype=torch.float64) + 1
    truth, number = float(data.mean() ** 2), int(part * 400) or 64
    errors, stated, hits = [], [], 0
    for _ in range(400):
        drawn = torch.randperm(400, generator=generator) if part else torch.randint(400, (400,), generator=generator)
        values = data[drawn[:number]]
        found = jackknife(*squared_mean(values, torch.arange(number) % 16)).of_finite_data(part)
        low, high = found.interval()
        hits += low - 1e-9 <= truth <= high + 1e-9
        errors.append(found.value - truth)
        stated.append(found.variance)
    assert abs(np.mean(errors)) < 0.1 * np.sqrt(np.mean(stated)) + 1e-9
    assert np.std(errors) == pytest.approx(np.sqrt(np.mean(stated)), rel=0.15, abs=1e-6)
    assert hits / 400 >= 0.92


def test_what_does_not_depend_on_the_samples_drawn_is_kept() -> None:
    values = torch.randn(16, dtype=torch.float64)
    found = jackknife(leave_one_out(values) / leave_one_out(torch.ones(16, dtype=torch.float64)), torch.ones(16))
    assert found.of_finite_data(1.0, kept=0.25).variance == pytest.approx(found.variance / 4)
    assert found.of_finite_data(0.5, kept=1.0).variance == pytest.approx(found.variance)


def test_figures_side_by_side_are_those_of_each_alone() -> None:
    """By loops over the replicates that hold something."""
    counts = torch.tensor([[3.0, 2.0, 0.0, 1.0], [0.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0, 2.0]], dtype=torch.float64).T
    estimates = torch.randn(5, 3, dtype=torch.float64) + 2
    for found, figure, own in zip(jackknife_each(estimates, counts), estimates.T, counts.T, strict=True):
        whole, held = float(figure[0]), [replicate for replicate in range(4) if own[replicate] > 0]
        if len(held) < 2:
            assert (found.value, found.bias, found.variance, found.degrees) == (whole, 0.0, math.inf, 0)
            continue
        ratios = {replicate: float(own.sum() / own[replicate]) for replicate in held}
        value = len(held) * whole - sum((1 - 1 / ratios[one]) * float(figure[1 + one]) for one in held)
        pseudo = {one: ratios[one] * whole - (ratios[one] - 1) * float(figure[1 + one]) for one in held}
        variance = sum((pseudo[one] - value) ** 2 / (ratios[one] - 1) for one in held) / len(held)
        assert found.value == pytest.approx(value, rel=1e-12)
        assert found.bias == pytest.approx(whole - value, rel=1e-9)
        assert (found.variance, found.degrees) == (pytest.approx(variance, rel=1e-12), len(held) - 1)

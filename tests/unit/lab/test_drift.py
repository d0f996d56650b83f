"""The formulas of drifting data against simulations and sums without them, and rules that look at the past only."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bnprobe.lab.drift import (
    averaged,
    best_momentum,
    chosen_momenta,
    correlated_values,
    drawn,
    effective_batch,
    error_of_correlated,
    error_of_walk,
    least_so_far,
    noise_bounds,
    random_walk,
    unbiased,
    worst_drift,
)


def test_the_running_average_is_torchs() -> None:
    values = torch.randn(20, 3, 5)
    layer = torch.nn.BatchNorm1d(5, momentum=0.3)
    for each in values:
        layer(each)
    means = averaged(values.mean(1), torch.zeros(5), 0.3)
    variances = averaged(values.var(1), torch.ones(5), 0.3)
    torch.testing.assert_close(means[-1], layer.running_mean)
    torch.testing.assert_close(variances[-1], layer.running_var)


def test_batches_are_drawn_with_the_moments_of_normal_values() -> None:
    mean, variance = torch.full((400, 500), 3.0).double(), torch.full((400, 500), 4.0).double()
    batches = drawn(mean, variance, 8)
    found = unbiased(batches)
    assert float(batches.mean.mean()) == pytest.approx(3, abs=0.01)
    assert float(batches.mean.var()) == pytest.approx(4 / 8, rel=0.03)
    assert float(found.mean()) == pytest.approx(4, rel=0.01)
    assert float(found.var()) == pytest.approx(2 * 16 / 7, rel=0.03)


@pytest.mark.parametrize("speed", [0.001, 0.1, 1.0, 50.0])
def test_the_best_momentum_is_the_minimum_of_the_error_and_the_gain_of_kalmans_filter(speed: float) -> None:
    best = best_momentum(speed)
    grid = [(place + 0.5) / 20000 for place in range(20000)]
    assert min(grid, key=lambda momentum: error_of_walk(momentum, speed)) == pytest.approx(best, abs=1e-3)
    assert error_of_walk(best, speed) == pytest.approx(best)
    variance = 1.0  # of the filter's estimate, in units of the noise
    for _ in range(10000):
        gain = (variance + speed) / (variance + speed + 1)
        variance = (1 - gain) * (variance + speed)
    assert gain == pytest.approx(best)


def test_without_drift_the_best_momentum_is_none() -> None:
    assert best_momentum(0.0) == 0.0


@pytest.mark.parametrize("speed", [0.01, 0.1, 1.0])
def test_the_error_on_a_walk_is_the_sum_over_all_steps_and_all_noise(speed: float) -> None:
    momentum = 0.2
    kept = [(1 - momentum) ** age for age in range(400)]
    expected = sum((momentum * weight) ** 2 for weight in kept)
    expected += speed * sum(((1 - momentum) * weight) ** 2 for weight in kept)
    assert error_of_walk(momentum, speed) == pytest.approx(expected)


def test_a_walk_moves_in_units_of_its_deviation() -> None:
    mean, deviation = random_walk(0.5, 50, 4000, 16)
    steps = mean.diff(dim=0) / deviation[1:]
    assert float(steps.var()) == pytest.approx(0.5 / 16, rel=0.03)
    assert float(deviation.log().diff(dim=0).var()) == pytest.approx(0.5 / 30, rel=0.03)


@pytest.mark.parametrize("goes_on", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_what_correlated_values_are_worth_is_what_their_covariances_say(rho: float, goes_on: bool) -> None:
    momentum, batch, batches = 0.3, 6, 40
    places = torch.arange(batch * batches)
    covariance = rho ** (places[:, None] - places).abs().double()
    if not goes_on:
        covariance *= (places[:, None] // batch == places // batch).double()
    of_mean = covariance[:batch, :batch].mean()
    assert effective_batch(batch, rho) == pytest.approx(1 / float(of_mean))
    ages = batches - 1 - places // batch
    weight = momentum * (1 - momentum) ** ages.double() / batch
    assert error_of_correlated(momentum, batch, rho, goes_on) == pytest.approx(float(weight @ covariance @ weight))


@pytest.mark.parametrize("goes_on", [False, True])
def test_correlated_values_are_correlated_as_said(goes_on: bool) -> None:
    values = correlated_values(4, 6, 20000, 0.8, goes_on)
    assert float(values.var()) == pytest.approx(1, rel=0.03)
    assert float((values[:, 3] * values[:, 5]).mean()) == pytest.approx(0.64, abs=0.03)
    assert float((values[1, 0] * values[0, -1]).mean()) == pytest.approx(0.8 if goes_on else 0.0, abs=0.03)


def test_the_worst_drift_is_steady() -> None:
    drift = worst_drift(0.2, 30, 0.1)
    torch.testing.assert_close(drift.abs(), torch.full_like(drift, 0.1))
    assert len(set(drift.sign().tolist())) == 1


def test_the_bound_of_noise_holds_about_as_often_as_it_says() -> None:
    momentum, batch, chance = 0.2, 8, 0.05
    zeros = torch.zeros(60, 20000, dtype=torch.float64)
    batches = drawn(zeros, zeros + 1, batch)
    of_mean, of_variance = noise_bounds(momentum, batch, chance)
    mean = averaged(batches.mean, zeros[0], momentum)[-1]
    variance = averaged(unbiased(batches), zeros[0] + 1, momentum)[-1]
    assert 0 < float((mean.abs() > of_mean).double().mean()) <= chance
    assert 0 < float(((variance - 1).abs() > of_variance).double().mean()) <= chance


@pytest.mark.parametrize("lengths", [(1,), (1, 16)])
def test_rules_look_at_the_past_and_find_the_speed(lengths: tuple[int, ...]) -> None:
    def stream_of(mean: Tensor, deviation: Tensor) -> Tensor:
        torch.manual_seed(1)
        return chosen_momenta(drawn(mean, deviation.square(), 64), lengths)

    mean, deviation = random_walk(0.2, 800, 64, 64)
    chosen = stream_of(mean, deviation)
    assert float(chosen[-1]) == pytest.approx(best_momentum(0.2), rel=0.15)
    mean[500:] += 100
    torch.testing.assert_close(stream_of(mean, deviation)[:501], chosen[:501], rtol=0, atol=0)
    assert float(chosen[0]) == 1.0


def test_where_nothing_drifts_two_lengths_find_a_small_momentum() -> None:
    zeros = torch.zeros(800, 64, dtype=torch.float64)
    assert float(chosen_momenta(drawn(zeros, zeros + 1, 32), (1, 16))[-1]) < 0.06


def test_the_least_so_far_is_that_of_the_batches_before() -> None:
    mismatch = torch.tensor([[3.0, 2.0, 4.0], [9.0, 5.0, 1.0], [1.0, 8.0, 7.0], [6.0, 5.0, 4.0]])
    assert least_so_far(mismatch).tolist() == [3.0, 5.0, 7.0, 4.0]

"""The replayed running average against torch's own layers, slow loops and what is known of exponential averages."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bnprobe.stats.ema import (
    Statistics,
    Stream,
    effective_batches,
    ranking,
    recovery,
    replay,
    settled,
    standard_error,
    weights,
    with_shift,
)

CHANNELS, EPS = 3, 1e-3
RATES = (1.0, 0.3, 0.1, 0.001, None)


def _batches(count: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 + 3.0 * torch.randn(count, *shape, generator=generator, dtype=torch.float64)


def _stream(batches: Tensor) -> Stream:
    flat = batches.transpose(1, 2).flatten(2) if batches.dim() > 3 else batches.transpose(1, 2)
    values = torch.full((len(batches),), float(flat.shape[2]), dtype=torch.float64)
    return Stream(flat.mean(2), flat.var(2, correction=0), values)


def _layer(batches: Tensor, momentum: float | None, tracked: int) -> nn.Module:
    kind = nn.BatchNorm2d if batches.dim() == 5 else nn.BatchNorm1d
    layer = kind(CHANNELS, eps=EPS, momentum=momentum, affine=False, dtype=torch.float64)
    layer.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
    layer.running_var.copy_(torch.tensor([0.5, 4.0, 9.0]))
    layer.num_batches_tracked.fill_(tracked)
    return layer


def _close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(2, CHANNELS), (2, CHANNELS, 3, 2)], ids=["1d", "2d"])
@pytest.mark.parametrize("tracked", [0, 7])
def test_a_real_layer_gets_the_same_statistics_and_the_same_mismatch(shape: tuple[int, ...], tracked: int) -> None:
    batches = _batches(20, *shape)
    start = _layer(batches, 0.1, tracked)
    begin = Statistics(start.running_mean.clone(), start.running_var.clone())
    found = replay(_stream(batches), begin, weights(RATES, 20, tracked), EPS)
    for index, rate in enumerate(RATES):
        layer = _layer(batches, rate, tracked)
        for update, batch in enumerate(batches):
            by_running = layer.eval()(batch)
            gap = (layer.train()(batch) - by_running).square().mean()
            _close(found.mismatch[update, index], gap, 1e-11)
        _close(found.mean[index], layer.running_mean)
        _close(found.variance[index], layer.running_var)


@given(
    rates=st.lists(st.one_of(st.floats(0.0, 1.0), st.none()), min_size=1, max_size=4),
    updates=st.integers(1, 12),
    seed=st.integers(0, 999),
)
def test_rates_run_side_by_side_as_each_by_itself(rates: list[float | None], updates: int, seed: int) -> None:
    stream = _stream(_batches(updates, 4, CHANNELS, seed=seed))
    start = Statistics(torch.zeros(CHANNELS, dtype=torch.float64), torch.ones(CHANNELS, dtype=torch.float64))
    together = replay(stream, start, weights(rates, updates, 0), EPS)
    for index, rate in enumerate(rates):
        alone = replay(stream, start, weights([rate], updates, 0), EPS)
        assert torch.equal(together.mismatch[:, index], alone.mismatch[:, 0])
        assert torch.equal(together.mean[index], alone.mean[0])
        assert torch.equal(together.variance[index], alone.variance[0])


def test_a_series_kept_in_float32_differs_by_its_rounding_only() -> None:
    stream = _stream(_batches(30, 4, CHANNELS))
    single = Stream(stream.mean.float(), stream.variance.float(), stream.values)
    start = settled(stream, 30)
    exact, rounded = (replay(one, start, weights(RATES, 30, 0), EPS).mismatch for one in (stream, single))
    assert rounded.dtype == torch.float64
    torch.testing.assert_close(rounded, exact, rtol=1e-4, atol=1e-6)
    assert not torch.equal(rounded, exact)


@given(st.integers(1, 15), st.integers(2, 9), st.integers(0, 99))
def test_a_cumulative_average_from_nothing_ends_settled(updates: int, size: int, seed: int) -> None:
    stream = _stream(_batches(updates, size, CHANNELS, seed=seed))
    nowhere = Statistics(torch.full((CHANNELS,), 99.0).double(), torch.full((CHANNELS,), 99.0).double())
    found = replay(stream, nowhere, weights([None], updates, 0), EPS)
    expected = settled(stream, updates)
    _close(found.mean[0], expected.mean)
    _close(found.variance[0], expected.variance)


def test_settled_statistics_are_those_of_the_first_updates_only() -> None:
    stream = _stream(_batches(8, 4, CHANNELS))
    part = Stream(stream.mean[:3], stream.variance[:3], stream.values[:3])
    assert torch.equal(settled(stream, 3).variance, settled(part, 3).variance)
    assert not torch.equal(settled(stream, 3).mean, settled(stream, 8).mean)


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.01])
def test_effective_batches_are_the_inverse_of_the_sum_of_squared_weights(rate: float) -> None:
    share = rate * (1 - rate) ** torch.arange(20_000, dtype=torch.float64)
    assert effective_batches(rate) == pytest.approx(1 / float(share.square().sum()), rel=1e-9)
    assert (effective_batches(None), effective_batches(0.0)) == (None, None)


def test_a_shift_changes_the_later_batches_and_not_the_recording() -> None:
    batches = _batches(6, 4, CHANNELS)
    stream, unit = _stream(batches), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    before = stream.mean.clone(), stream.variance.clone()
    other = batches.clone()
    centre = other[4:].mean(1, keepdim=True)
    other[4:] = centre + 0.5 * (other[4:] - centre) + 2.0 * unit
    found, expected = with_shift(stream, 4, unit, 2.0, 0.5), _stream(other)
    _close(found.mean, expected.mean)
    _close(found.variance, expected.variance)
    assert torch.equal(stream.mean, before[0])
    assert torch.equal(stream.variance, before[1])


@pytest.mark.parametrize("rate", [0.3, 0.1, 0.03])
def test_recovery_from_a_shift_takes_as_long_as_an_exponential_average_needs(rate: float) -> None:
    """Two channels that swing against each other: their mean D falls from S^2 by exactly (1 - a)^2 a batch."""
    count, shift = 300, 3.0
    swing = torch.tensor([0.2, 0.0, -0.2, 0.0], dtype=torch.float64).repeat(count // 2)
    mean = torch.stack([swing, -swing], 1)
    stream = Stream(mean, torch.full_like(mean, 0.5), torch.full((2 * count,), 2.0, dtype=torch.float64))
    start = Statistics(torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    weight, unit = weights([rate], 2 * count, 0), torch.ones(2, dtype=torch.float64)
    plain, shifted = (
        replay(one, start, weight, 0.0).mismatch[count:, 0]
        for one in (stream, with_shift(stream, count, unit, shift, 1.0))
    )
    expected = math.log(float(plain.mean()) / shift**2) / (2 * math.log(1 - rate))
    assert recovery(plain, shifted) == math.ceil(expected)


def test_recovery_at_once_and_never() -> None:
    plain = torch.ones(10, dtype=torch.float64)
    assert recovery(plain, plain) == 0
    assert recovery(plain, plain + 0.99) == 0
    assert recovery(plain, plain + 1.01) is None
    late = plain.clone()
    late[:4] = 5.0
    late[6] = 5.0  # back only once it stays back
    assert recovery(plain, late) == 7


def test_what_differs_surely_is_no_tie_however_noisy_what_is_common() -> None:
    common = 5.0 * torch.randn(200, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = 0.01 * torch.randn(200, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    series = common + own + torch.tensor([0.1, 0.0, 0.0], dtype=torch.float64)
    found = ranking(series, series)
    assert 0 not in found
    assert set(found) == {1, 2}


def test_the_way_from_a_start_is_no_chance() -> None:
    noise = 0.01 * torch.randn(100, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    way = torch.stack([torch.zeros(100), 5.0 * 0.8 ** torch.arange(100)], 1).double()
    assert ranking(noise + way, noise + way) == (0, 1)  # the spread of the way taken for chance
    assert ranking(noise + way, noise) == (0,)


def test_a_lead_smaller_than_the_error_of_the_mean_itself_is_none() -> None:
    flat = torch.full((50, 3), 1.0, dtype=torch.float64) + torch.tensor([0.0, 0.019, 0.021], dtype=torch.float64)
    assert ranking(flat, flat) == (0, 1)


def test_ties_are_called_ties_about_as_often_as_they_should_be() -> None:
    """Two rates that are alike: the loser is called worse in about 5% of the streams, not more than 12."""
    generator = torch.Generator().manual_seed(4)
    trials = [torch.randn(60, 2, generator=generator, dtype=torch.float64) for _ in range(300)]
    worse = sum(len(ranking(series, series)) == 1 for series in trials)
    assert 3 <= worse <= 36


def test_the_error_of_a_mean() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert standard_error(values) == pytest.approx(5000**-0.5, rel=0.5)
    held = values[:500].repeat_interleave(10)  # ten times fewer independent values
    assert standard_error(held) == pytest.approx(500**-0.5, rel=0.5)
    assert standard_error(values[:3]) is None

"""Noise of the backward statistics: the law of independent values, the jackknife, and how often it holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

from bnprobe.stats.backward import backward_noise


def independent(batches: int, size: int, channels: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """E[g], E[g * xhat] and E[g^2] of independent normal values."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(batches, size, channels, generator=generator, dtype=torch.float64) * 1e-4
    x = torch.randn(batches, size, channels, generator=generator, dtype=torch.float64)
    xhat = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    return g.mean(1), (g * xhat).mean(1), g.square().mean(1)


def slow_noise(g: Tensor, product: Tensor, square: Tensor) -> float:
    """The definition, channel by channel."""
    ratios = [
        (np.var(g[:, c].numpy(), ddof=1) + np.var(product[:, c].numpy(), ddof=1)) / square[:, c].numpy().mean()
        for c in range(g.shape[1])
    ]
    return float(np.mean(ratios))


@pytest.mark.parametrize("size", [2, 4, 32])
def test_independent_values_give_two_over_n(size: int) -> None:
    found = backward_noise(*independent(40, size, 400, seed=size))
    assert found is not None
    assert found.noise == pytest.approx(2 / size, rel=0.03)
    assert found.equivalent_batch_size == pytest.approx(size, rel=0.03)


def test_the_interval_is_the_jackknife() -> None:
    figures = independent(7, 3, 5, seed=1)
    noise = slow_noise(*figures)
    without = np.array([slow_noise(*(torch.cat([f[:k], f[k + 1 :]]) for f in figures)) for k in range(7)])
    error = np.sqrt(6 / 7 * np.square(without - without.mean()).sum())
    half = scipy_stats.t.ppf(0.975, 6) * error
    found = backward_noise(*figures)
    assert found is not None
    assert found.noise == pytest.approx(noise)
    assert found.interval == pytest.approx((noise * np.exp(-half / noise), noise * np.exp(half / noise)))


def test_the_interval_holds_the_law_as_often_as_it_says() -> None:
    held = 0
    for seed in range(300):
        found = backward_noise(*independent(16, 8, 20, seed=seed))
        assert found is not None
        assert found.interval is not None
        assert found.interval[1] is not None
        held += found.interval[0] <= 2 / 8 <= found.interval[1]
    assert 0.92 <= held / 300 <= 0.98


def test_dead_channels_are_left_out() -> None:
    figures = independent(5, 4, 6, seed=2)
    dead = [torch.cat([figure, torch.zeros(5, 3, dtype=torch.float64)], 1) for figure in figures]
    assert backward_noise(*dead) == backward_noise(*figures)


def test_a_channel_that_lives_in_one_batch_only() -> None:
    figures = [torch.zeros(4, 1, dtype=torch.float64) for _ in range(3)]
    figures[0][2], figures[2][2] = 1.0, 1.0
    found = backward_noise(*figures)
    assert found is not None
    assert found.noise == pytest.approx(1.0)
    assert found.interval is not None


def test_too_little_to_tell() -> None:
    figures = independent(3, 4, 2, seed=3)
    assert backward_noise(*(figure[:1] for figure in figures)) is None
    assert backward_noise(*(torch.zeros(3, 2) for _ in range(3))) is None
    two = backward_noise(*(figure[:2] for figure in figures))
    assert two is not None
    assert two.interval is None


def test_no_noise_at_all() -> None:
    same = torch.ones(4, 2, dtype=torch.float64)
    found = backward_noise(same, same, same)
    assert found is not None
    assert (found.noise, found.interval, found.equivalent_batch_size) == (0.0, (0.0, 0.0), None)

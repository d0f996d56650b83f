"""Moments of rows and their pooling against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bnprobe.stats.moments import pool_moments, row_moments

spaces = st.lists(st.integers(1, 5), max_size=3).map(tuple)
seeds = st.integers(0, 2**16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = x.double().reshape(*x.shape[:2], -1).numpy()
    return values.mean(2), values.var(2)


def assert_moments(x: Tensor, rtol: float, floor: float = 0.0) -> None:
    mean, variance = row_moments(x, floor)
    assert mean.dtype == variance.dtype == torch.float64
    reference_mean, reference_variance = expected(x)
    np.testing.assert_allclose(mean, reference_mean, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(variance, reference_variance, rtol=10 * rtol, atol=rtol**2)


@given(st.integers(1, 5), st.integers(1, 5), spaces, seeds, st.sampled_from([torch.float32, torch.float64]))
def test_rows_of_any_shape(rows: int, channels: int, space: tuple[int, ...], seed: int, dtype: torch.dtype) -> None:
    assert_moments(normal(rows, channels, *space, seed=seed, dtype=dtype) + 0.5, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    assert_moments(normal(3, 4, 40, 40, dtype=dtype) + 2, 1e-5)


@pytest.mark.parametrize("space", [(64,), (24, 24), (8, 8, 8)])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("far", [10.0, 1e3, 3e4])
def test_a_mean_far_beyond_the_spread(space: tuple[int, ...], last: bool, far: float) -> None:
    x = far + 0.01 * normal(4, 6, *space)
    x[:, ::2] -= far  # only some channels are affected
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        assert not x.is_contiguous()
    mean, variance = row_moments(x)
    reference_mean, reference_variance = expected(x)
    np.testing.assert_allclose(mean, reference_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(variance, reference_variance, rtol=1e-4)
    assert (variance >= 0).all()


def test_a_variance_far_below_the_floor_is_not_worth_a_second_look() -> None:
    x = 1 + 1e-6 * normal(4, 3, 64)
    _, variance = row_moments(x, floor=1e-2)
    np.testing.assert_allclose(variance, expected(x)[1], atol=1e-5 * 1e-2 * 10)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4, -3.3])
@pytest.mark.parametrize("last", [False, True])
def test_constant_rows_have_no_variance(value: float, last: bool) -> None:
    x = torch.full((3, 4, 5, 5), value)
    x = x.to(memory_format=torch.channels_last) if last else x
    mean, variance = row_moments(x)
    np.testing.assert_allclose(mean, x.double().mean((2, 3)), rtol=1e-7)
    assert variance.max() <= 1e-12 * max(value**2, 1)


def test_one_position_has_exactly_no_variance() -> None:
    for shape in [(5, 3), (5, 3, 1), (5, 3, 1, 1)]:
        x = normal(*shape) * 1e6
        mean, variance = row_moments(x)
        assert torch.equal(mean, x.double().reshape(5, 3))
        assert torch.equal(variance, torch.zeros(5, 3, dtype=torch.float64))


def test_non_finite_values_stay_visible() -> None:
    x = normal(3, 2, 4, 4)
    x[1, 0, 2, 2] = float("nan")
    x[2, 1, 0, 0] = float("inf")
    mean, _ = row_moments(x)
    assert torch.isfinite(mean).tolist() == [[True, True], [False, True], [True, False]]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), seeds)
def test_pooling_does_not_depend_on_how_it_is_split(one: int, two: int, groups: int, space: int, seed: int) -> None:
    x = normal(groups * one * two, 3, space, space, seed=seed, dtype=torch.float64) + 5
    rows = row_moments(x)
    at_once = pool_moments(*rows, one * two)
    in_steps = pool_moments(*pool_moments(*rows, one), two)
    torch.testing.assert_close(in_steps, at_once, rtol=1e-12, atol=1e-12)
    values = x.reshape(groups, one * two, 3, -1).movedim(2, 1).reshape(groups, 3, -1).numpy()
    np.testing.assert_allclose(at_once[0], values.mean(2), rtol=1e-12)
    np.testing.assert_allclose(at_once[1], values.var(2), rtol=1e-9, atol=1e-12)


@given(st.permutations(range(6)), seeds)
def test_pooling_does_not_depend_on_the_order_within_a_group(order: list[int], seed: int) -> None:
    mean, variance = row_moments(normal(6, 2, 7, seed=seed))
    pooled = pool_moments(mean, variance, 6)
    torch.testing.assert_close(pool_moments(mean[order], variance[order], 6), pooled, rtol=1e-12, atol=1e-12)


def test_pooling_cannot_cancel() -> None:
    mean, variance = torch.full((4, 1), 1e8, dtype=torch.float64), torch.full((4, 1), 1e-8, dtype=torch.float64)
    assert pool_moments(mean, variance, 4)[1].item() == 1e-8


@pytest.mark.parametrize("space", [(64, 64, 64), (1024, 1024), (2**16 + 1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_very_many_positions(space: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(1, 2, *space, dtype=dtype) + 5
    np.testing.assert_allclose(row_moments(x)[1], expected(x)[1], rtol=5e-5)


def test_what_rounds_up_in_every_sum_does_not_add_up() -> None:
    """Squares of one size round alike, and one float32 sum over all positions would stop growing."""
    x = torch.full((1, 1, 1024, 1024), 5.1)
    x[..., ::2] = -4.9
    np.testing.assert_allclose(row_moments(x)[1], expected(x)[1], rtol=1e-4)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("scale", [1e18, 1e20, 1e37])
def test_values_whose_squares_are_beyond_float32(scale: float, last: bool) -> None:
    x = (normal(2, 3, 16, 16) + 3).clamp(-6, 6) * scale
    x[:, 0] /= scale  # only some channels are affected
    x = x.to(memory_format=torch.channels_last) if last else x
    mean, variance = row_moments(x)
    reference_mean, reference_variance = expected(x)
    np.testing.assert_allclose(mean, reference_mean, rtol=1e-5)
    np.testing.assert_allclose(variance, reference_variance, rtol=1e-4)

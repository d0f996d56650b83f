from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from bnprobe.nn import AffineMap, Statistics

Z = torch.linspace(-3, 3, 2 * 4 * 5, dtype=torch.float64).reshape(2, 4, 5)
EPS = 1e-3


def _statistics(seed: int, *shape: int) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    return Statistics(mean, torch.rand(shape, generator=generator, dtype=torch.float64) + 0.01, EPS)


def _normalized(x: Tensor, statistics: Statistics) -> Tensor:
    mean, variance = (
        part.reshape(-1, part.shape[-1], *[1] * (x.dim() - 2)) for part in (statistics.mean, statistics.variance)
    )
    return (x - mean) / (variance + EPS).sqrt()


@pytest.mark.parametrize("source", [(4,), (2, 4)])
@pytest.mark.parametrize("target", [(4,), (2, 4)])
def test_between_turns_one_normalization_into_another(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    a, b = _statistics(1, *source), _statistics(2, *target)
    assert_close(AffineMap.between(a, b)(_normalized(Z, a)), _normalized(Z, b))


def test_batch_to_running_is_the_r_and_d_of_the_paper() -> None:
    batch, running = _statistics(1, 4), _statistics(2, 4)
    correction = AffineMap.between(batch, running)
    deviation = (running.variance + EPS).sqrt()
    assert_close(correction.scale, (batch.variance + EPS).sqrt() / deviation)
    assert_close(correction.shift, (batch.mean - running.mean) / deviation)


@given(st.integers(0, 99), st.integers(100, 199), st.integers(200, 299))
def test_maps_compose_as_the_normalizations_do(one: int, two: int, three: int) -> None:
    a, b, c = (_statistics(seed, 4) for seed in (one, two, three))
    direct = AffineMap.between(a, c)
    composed = AffineMap.between(a, b).then(AffineMap.between(b, c))
    assert_close(composed.scale, direct.scale)
    assert_close(composed.shift, direct.shift)
    there_and_back = AffineMap.between(a, b).then(AffineMap.between(b, a))
    assert_close(there_and_back(Z), Z)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)])
def test_blending_maps_is_blending_outputs(weight: float | Tensor) -> None:
    change = AffineMap.between(_statistics(1, 2, 4), _statistics(2, 4))
    part = weight.reshape(4, 1) if isinstance(weight, Tensor) else weight
    assert_close(change.blend(weight)(Z), (1 - part) * Z + part * change(Z))


def test_clamp_keeps_r_and_d_within_limits() -> None:
    wild = AffineMap(torch.tensor([0.01, 0.5, 1.7, 90.0]), torch.tensor([-70.0, -4.0, 1.0, 6.0]))
    tamed = wild.clamp(3.0, 5.0)
    assert_close(tamed.scale, torch.tensor([1 / 3, 0.5, 1.7, 3.0]))
    assert_close(tamed.shift, torch.tensor([-5.0, -4.0, 1.0, 5.0]))
    by_tensors = wild.clamp(torch.tensor(3.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64))
    assert_close((by_tensors.scale, by_tensors.shift), (tamed.scale, tamed.shift))
    plain = wild.clamp(1.0, 0.0)
    assert torch.equal(plain.scale, torch.ones(4))
    assert torch.equal(plain.shift, torch.zeros(4))


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
def test_fold_is_the_map_and_then_weight_and_bias(has_weight: bool, has_bias: bool) -> None:
    weight, bias = _statistics(3, 4).mean, _statistics(4, 4).mean
    change = AffineMap.between(_statistics(1, 2, 4), _statistics(2, 4))
    expected = change(Z) * (weight.reshape(4, 1) if has_weight else 1) + (bias.reshape(4, 1) if has_bias else 0)
    assert_close(change.fold(weight if has_weight else None, bias if has_bias else None)(Z), expected)


def test_detach_is_constant_for_the_gradient() -> None:
    scale = torch.ones(4, requires_grad=True)
    assert AffineMap(scale, scale)(Z).requires_grad
    assert not AffineMap(scale, scale).detach()(Z).requires_grad

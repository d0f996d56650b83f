"""The layers of the laboratory against torch's and bnprobe's: outputs, gradients, running statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bnprobe.nn
from bnprobe.lab import layers

CHANNELS = 8
TORCHS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
RENORMS = {4: bnprobe.nn.BatchRenorm2d, 5: bnprobe.nn.BatchRenorm3d}
SHAPES = [(6, CHANNELS), (6, CHANNELS, 5), (6, CHANNELS, 4, 3), (2, CHANNELS, 3, 2, 2)]


def inputs(shape: tuple[int, ...]) -> Tensor:
    return 3 + 2 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def perturbed(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter += 0.1 * (number + torch.arange(CHANNELS))
    return layer.double()


def agree(ours: nn.Module, others: nn.Module, shape: tuple[int, ...]) -> None:
    """Twice in train mode, so that running statistics have moved, then once in eval mode."""
    for mode in (True, True, False):
        results = []
        for layer in (ours.train(mode), others.train(mode)):
            x = inputs(shape).requires_grad_()
            y = layer(x)
            weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape)
            found = torch.autograd.grad((y * weights).sum(), [x, layer.weight, layer.bias])
            results.append([y, *found])
        for here, there in zip(*results, strict=True):
            torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum", [0.1, 0.7])
@pytest.mark.parametrize("kind", [layers.BatchNorm, layers.BatchNormByHand])
def test_batch_norm_is_torchs(kind: type[layers.BatchNorm], shape: tuple[int, ...], momentum: float) -> None:
    ours = perturbed(kind(CHANNELS, momentum, eps=0.01))
    torchs = perturbed(TORCHS[len(shape)](CHANNELS, momentum=momentum, eps=0.01))
    agree(ours, torchs, shape)
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)


@pytest.mark.parametrize("kind", [layers.BatchNorm, layers.BatchNormByHand])
def test_frozen_batch_norm_keeps_and_uses_its_averages(kind: type[layers.BatchNorm]) -> None:
    layer = kind(CHANNELS, frozen=True).double()
    layer.running_mean += 3
    x = inputs((6, CHANNELS, 4, 4))
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert torch.equal(layer.running_mean, torch.full((CHANNELS,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES[2:])
def test_batch_renorm_is_bnprobes(shape: tuple[int, ...]) -> None:
    ours = perturbed(layers.BatchRenorm(CHANNELS))
    theirs = perturbed(RENORMS[len(shape)](CHANNELS, momentum=0.1))
    agree(ours, theirs, shape)


def test_batch_renorm_of_closed_limits_is_batch_norm() -> None:
    agree(layers.BatchRenorm(CHANNELS, r_max=1.0, d_max=0.0).double(), nn.BatchNorm2d(CHANNELS).double(), SHAPES[2])


@pytest.mark.parametrize("groups", [1, 2, CHANNELS])
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_group_norm_is_torchs(shape: tuple[int, ...], groups: int) -> None:
    agree(perturbed(layers.GroupNorm(CHANNELS, groups)), perturbed(nn.GroupNorm(groups, CHANNELS)), shape)


@pytest.mark.parametrize(
    ("make", "groups"), [(layers.layer_norm, 1), (layers.instance_norm, CHANNELS), (layers.group_norm, 8)]
)
def test_names_of_group_norms(make: object, groups: int) -> None:
    assert callable(make)
    assert make(CHANNELS).groups == groups

"""The family of torch's BatchNorm layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnprobe
from bnprobe.errors import ModelError
from bnprobe.measure.norms import NORMS, BatchNormFamily, family_of
from bnprobe.nn import (
    BatchRenorm1d,
    BatchRenorm2d,
    GatedBatchNorm1d,
    GatedBatchNorm2d,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
)

FAMILY = BatchNormFamily()


class Own(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2), nn.LazyBatchNorm2d(), Own(2)],
    ids=lambda module: type(module).__name__,
)
def test_members(module: nn.Module) -> None:
    assert FAMILY.matches(module)


@pytest.mark.parametrize("module", [nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.Linear(2, 2)])
def test_strangers(module: nn.Module) -> None:
    assert not FAMILY.matches(module)


def test_a_layer_belongs_to_the_most_special_family() -> None:
    layers = {
        "batch-norm": nn.BatchNorm2d(2),
        "batch-renorm": BatchRenorm2d(2),
        "gated": GatedBatchNorm2d(2),
        "ghost-batch-norm": GhostBatchNorm2d(2),
    }
    assert all(family_of(layer) is NORMS[name] for name, layer in layers.items())
    assert family_of(nn.GroupNorm(1, 2)) is None


def test_description() -> None:
    layer = nn.BatchNorm2d(3, eps=0.01, momentum=None)
    layer(torch.randn(4, 3, 2, 2))
    info = FAMILY.describe(layer)
    assert (info.channels, info.eps, info.momentum, info.batches_tracked) == (3, 0.01, None, 1)
    assert info.running_mean is layer.running_mean
    assert info.running_variance is layer.running_var


def test_description_without_running_statistics() -> None:
    info = FAMILY.describe(nn.BatchNorm1d(3, track_running_stats=False))
    assert (info.batches_tracked, info.running_mean, info.running_variance) == (None, None, None)


def test_only_a_lazy_layer_that_saw_nothing_is_an_obstacle() -> None:
    lazy = nn.LazyBatchNorm1d()
    assert "lazy" in FAMILY.obstacle(lazy)
    lazy(torch.randn(4, 3))
    assert FAMILY.obstacle(lazy) is None
    assert FAMILY.obstacle(nn.BatchNorm1d(3, affine=False)) is None


def test_parse_reads_what_the_layer_passes() -> None:
    x, mean, variance, weight, bias = torch.randn(4, 3), *torch.rand(4, 3)
    call = FAMILY.parse(x, mean, variance, weight, bias, True, 0.3, 0.01)
    assert call.input is x
    assert call.running_mean is mean
    assert call.running_variance is variance
    assert call.weight is weight
    assert call.bias is bias
    assert (call.training, call.eps) == (True, 0.01)
    assert FAMILY.parse(x, None, None, eps=0.5).eps == 0.5


def test_evaluate_is_the_layers_own_kernel() -> None:
    x, mean, variance, weight, bias = torch.randn(4, 3), *torch.rand(4, 3)
    call = FAMILY.parse(x, mean, variance, weight, bias, training=False, eps=0.01)
    assert torch.equal(FAMILY.evaluate(call), F.batch_norm(x, mean, variance, weight, bias, eps=0.01))


@pytest.mark.parametrize(
    ("settings", "reason"), [({"renorm_momentum": 0.1}, "averages of their own"), ({"r_min": 0.2}, "a lower limit")]
)
def test_layers_whose_correction_is_not_known_are_an_obstacle(settings: dict[str, float], reason: str) -> None:
    layer = BatchRenorm2d(3, **settings)
    family = family_of(layer)
    assert family is not None
    assert reason in (family.obstacle(layer) or "")


@pytest.mark.parametrize("kind", [BatchRenorm1d, GatedBatchNorm1d, GhostBatchNorm1d])
def test_a_call_with_a_mask_is_refused(kind: type[nn.Module]) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = kind(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x, mask=x[:, 0] > 0)

    with pytest.raises(ModelError, match=r"norm is called with a mask.*exclude=\['norm'\]"):
        bnprobe.scan(Padded(), [torch.randn(4, 3, 5) for _ in range(4)], batch_size=4)

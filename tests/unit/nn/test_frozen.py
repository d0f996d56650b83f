from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from bnprobe.nn.frozen import FrozenBatchNorm, FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from support.networks import unsettled

SHAPES = [
    (FrozenBatchNorm1d, nn.BatchNorm1d, (4, 3)),
    (FrozenBatchNorm1d, nn.BatchNorm1d, (4, 3, 5)),
    (FrozenBatchNorm2d, nn.BatchNorm2d, (4, 3, 5, 6)),
    (FrozenBatchNorm3d, nn.BatchNorm3d, (4, 3, 5, 6, 2)),
]


@pytest.mark.parametrize(("frozen", "plain", "shape"), SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_trains_with_what_bn_infers_with(
    frozen: type[FrozenBatchNorm], plain: type[nn.BatchNorm1d], shape: tuple[int, ...], affine: bool
) -> None:
    layer, bn = frozen(3, affine=affine), unsettled(plain(3, affine=affine)).eval()
    layer.load_state_dict(bn.state_dict(), strict=True)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    x = torch.randn(shape)
    own, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = layer.train()(own), bn(other)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(own.grad, other.grad, rtol=0, atol=0)
    if affine:
        torch.testing.assert_close(layer.weight.grad, bn.weight.grad, rtol=0, atol=0)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])


def test_takes_one_value_per_channel_and_an_infinite_activation() -> None:
    layer = FrozenBatchNorm1d(3).train()
    layer(torch.randn(1, 3))
    layer(torch.full((2, 3), float("inf")))
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_its_weights_are_those_of_plain_bn() -> None:
    layer, bn = FrozenBatchNorm2d(3), nn.BatchNorm2d(3)
    assert list(layer.state_dict()) == list(bn.state_dict())
    bn.load_state_dict(layer.state_dict(), strict=True)
    assert isinstance(layer, nn.BatchNorm2d)


def test_copies_and_pickles() -> None:
    layer = unsettled(FrozenBatchNorm2d(3))
    x = torch.randn(2, 3, 4, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (FrozenBatchNorm1d, (2, 3, 4, 4)),
        (FrozenBatchNorm2d, (2, 3)),
        (FrozenBatchNorm3d, (2, 3, 4, 4)),
        (FrozenBatchNorm, (3,)),
    ],
)
def test_refuses_inputs_of_other_dimensions(layer: type[FrozenBatchNorm], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        layer(3)(torch.randn(shape))

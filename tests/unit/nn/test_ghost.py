from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bnprobe.errors import UsageError
from bnprobe.nn.ghost import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from support.networks import unsettled

SHAPES = [
    (GhostBatchNorm1d, (8, 3)),
    (GhostBatchNorm1d, (7, 3, 5)),
    (GhostBatchNorm2d, (8, 3, 4, 5)),
    (GhostBatchNorm2d, (5, 3, 4, 5)),
    (GhostBatchNorm3d, (4, 3, 3, 2, 2)),
]


def definition(x: Tensor, layer: GhostBatchNorm, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1 of Hoffer et al. in single values: the output, and the running statistics after it."""
    mean, variance = layer.running_mean.clone(), layer.running_var.clone()
    parts = []
    for part in x.split(sizes):
        values = part.transpose(0, 1).flatten(1)
        m = values.sum(1) / values.shape[1]
        v = ((values - m[:, None]) ** 2).sum(1) / values.shape[1]
        shape = (1, -1, *[1] * (x.dim() - 2))
        z = (part - m.view(shape)) / (v.view(shape) + layer.eps) ** 0.5
        parts.append(layer.weight.view(shape) * z + layer.bias.view(shape))
        unbiased = v * values.shape[1] / (values.shape[1] - 1)
        mean = (1 - layer.momentum) * mean + layer.momentum * m
        variance = (1 - layer.momentum) * variance + layer.momentum * unbiased
    return torch.cat(parts), mean.detach(), variance.detach()


def made(kind: type[GhostBatchNorm], size: int = 3, **options: object) -> GhostBatchNorm:
    return unsettled(kind(3, dtype=torch.float64, virtual_batch_size=size, **options)).train()


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("size", [2, 3, 4, 100])
def test_output_gradients_and_statistics_are_those_of_the_definition(
    kind: type[GhostBatchNorm], shape: tuple[int, ...], size: int
) -> None:
    layer = made(kind, size, momentum=0.3)
    parts = -(-shape[0] // size)
    sizes = [shape[0] // parts + (i < shape[0] % parts) for i in range(parts)]
    assert max(sizes) <= size
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    expected, mean, variance = definition(x, layer, sizes)
    leaves = [x, *layer.parameters()]
    wanted = torch.autograd.grad(expected, leaves, upstream)
    out = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(out, leaves, upstream), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(layer.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, variance, rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == parts


def test_small_batches_and_inference_are_those_of_bn() -> None:
    layer, bn = made(GhostBatchNorm2d, 8, momentum=None), nn.BatchNorm2d(3, momentum=None, dtype=torch.float64)
    bn.load_state_dict(layer.state_dict(), strict=True)
    for training in (True, False):
        x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
        torch.testing.assert_close(layer.train(training)(x), bn.train(training)(x))
    torch.testing.assert_close(dict(layer.state_dict()), dict(bn.state_dict()))


def test_no_sample_sees_another_part() -> None:
    layer, x = made(GhostBatchNorm2d, 2), torch.randn(4, 3, 4, 4, dtype=torch.float64)
    other = torch.cat([x[:2], 100 * torch.randn(2, 3, 4, 4, dtype=torch.float64)])
    assert torch.equal(copy.deepcopy(layer)(x)[:2], layer(other)[:2])


@pytest.mark.parametrize(("rows", "size"), [(4, 1), (5, 2), (1, 32)])
def test_a_part_of_one_value_is_refused(rows: int, size: int) -> None:
    layer = made(GhostBatchNorm1d, size)
    with pytest.raises(ValueError, match="expected more than 1 value per channel in each part"):
        layer(torch.randn(rows, 3, dtype=torch.float64))
    layer(torch.randn(rows, 3, 2, dtype=torch.float64))
    layer.eval()(torch.randn(rows, 3, dtype=torch.float64))


def test_an_empty_batch_is_counted_and_changes_nothing_else() -> None:
    layer = GhostBatchNorm2d(3)
    assert layer(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert layer.num_batches_tracked == 1  # as in BN
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_a_part_needs_a_sample() -> None:
    with pytest.raises(UsageError, match="virtual_batch_size is 0, but must be at least 1"):
        GhostBatchNorm2d(3, virtual_batch_size=0)
    assert "virtual_batch_size=32" in repr(GhostBatchNorm2d(3))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(GhostBatchNorm1d, (2, 3, 4, 4)), (GhostBatchNorm2d, (2, 3)), (GhostBatchNorm, (3,))],
)
def test_refuses_inputs_of_other_dimensions(layer: type[GhostBatchNorm], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        layer(3)(torch.randn(shape))

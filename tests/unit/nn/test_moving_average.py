from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

from bnprobe.errors import UsageError
from bnprobe.nn.moving_average import (
    MovingAverageBatchNorm,
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
)
from bnprobe.repairs import deployable_state
from support.networks import unsettled

SHAPES = [
    (MovingAverageBatchNorm1d, (4, 3)),
    (MovingAverageBatchNorm1d, (1, 3)),
    (MovingAverageBatchNorm1d, (2, 3, 5)),
    (MovingAverageBatchNorm2d, (1, 3, 4, 5)),
    (MovingAverageBatchNorm3d, (2, 3, 3, 2, 2)),
]


class Definition:
    """The docstring's formulas, value by value, with lists of all batches so far."""

    def __init__(self, layer: MovingAverageBatchNorm) -> None:
        self.layer = copy.deepcopy(layer)
        self.batches: list[Tensor] = []
        self.gradients: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Output, and gradients of the input, the weight and the bias."""
        layer = self.layer
        shape = (1, -1, *[1] * (x.dim() - 2))
        axes = [0, *range(2, x.dim())]
        values = x.transpose(0, 1).flatten(1)
        self.batches.append(values)
        window = self.batches[-layer.window :]
        mean = sum(each.mean(1) for each in window) / len(window)
        variance = sum(((each - mean[:, None]) ** 2).mean(1) for each in window) / len(window)
        s, to = (variance + layer.eps).sqrt(), (layer.running_var + layer.eps).sqrt()
        r, d = s / to, (mean - layer.running_mean) / to
        if sum(each.shape[1] for each in window) > 1:
            r, d = r.clamp(1 / layer.r_max, layer.r_max), d.clamp(-layer.d_max, layer.d_max)
        z = (x - mean.view(shape)) / s.view(shape)
        weight, bias = layer.weight.detach().view(shape), layer.bias.detach().view(shape)
        y = weight * (r.view(shape) * z + d.view(shape)) + bias
        g = r.view(shape) * weight * upstream
        self.gradients.append((g.mean(axes), (g * z).mean(axes)))
        by_mean, by_product = (
            (sum(each) / len(each)).view(shape) for each in zip(*self.gradients[-layer.window :], strict=True)
        )
        own = (g - by_mean - z * by_product) / s.view(shape)
        layer.running_mean += layer.momentum * (values.mean(1) - layer.running_mean)
        if values.shape[1] > 1:
            layer.running_var += layer.momentum * (values.var(1) - layer.running_var)
        corrected = r.view(shape) * z + d.view(shape)
        return y, own, (upstream * corrected).sum(axes), upstream.sum(axes)


def made(kind: type[MovingAverageBatchNorm], **options: object) -> MovingAverageBatchNorm:
    return unsettled(kind(3, dtype=torch.float64, **options)).train()


@pytest.mark.parametrize(("kind", "shape"), SHAPES)
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("limits", [{}, {"r_max": 10.0, "d_max": 10.0}])
def test_output_and_gradients_are_those_of_the_definition(
    kind: type[MovingAverageBatchNorm], shape: tuple[int, ...], window: int, limits: dict[str, float]
) -> None:
    """Over more batches than the window holds."""
    layer = made(kind, window=window, momentum=0.3, **limits)
    expected = Definition(layer)
    for _ in range(7):
        x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
        upstream = torch.randn(shape, dtype=torch.float64)
        out = layer(x)
        found = (out, *torch.autograd.grad(out, [x, layer.weight, layer.bias], upstream))
        for ours, theirs in zip(found, expected(x.detach(), upstream), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(layer.running_mean, expected.layer.running_mean)
    torch.testing.assert_close(layer.running_var, expected.layer.running_var)
    assert layer.batches_seen == layer.gradients_seen == 7


def test_a_window_of_one_with_no_correction_is_bn() -> None:
    layer = made(MovingAverageBatchNorm2d, window=1, r_max=1.0, d_max=0.0)
    bn = nn.BatchNorm2d(3, dtype=torch.float64)
    bn.load_state_dict(deployable_state(layer, bn))
    for _ in range(2):
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        out, expected = layer(x), bn(x)
        torch.testing.assert_close(out, expected)
        gradients = [
            torch.autograd.grad(y, [x, *own.parameters()], upstream) for y, own in ((out, layer), (expected, bn))
        ]
        torch.testing.assert_close(*gradients)
    torch.testing.assert_close(deployable_state(layer, bn), dict(bn.state_dict()))
    torch.testing.assert_close(layer.eval()(x), bn.eval()(x))


def test_averages_are_less_noisy_than_those_of_a_batch() -> None:
    """The error of the mean falls as the root of the window."""
    torch.manual_seed(0)
    errors = {}
    for window in (1, 16):
        layer = MovingAverageBatchNorm1d(512, window=window, r_max=1.0, d_max=0.0, affine=False)
        for _ in range(20):
            x = torch.randn(2, 512, requires_grad=True)
            layer(x).square().sum().backward()
        used = layer.batch_means.mean(0)
        errors[window] = float(used.square().mean())
    assert errors[1] / errors[16] == pytest.approx(16, rel=0.3)


def test_padding_does_not_count() -> None:
    layer = made(MovingAverageBatchNorm1d, window=2)
    twin = copy.deepcopy(layer)
    for _ in range(3):
        x = torch.randn(6, 3, 5, dtype=torch.float64)
        padded = torch.cat([x, torch.full_like(x, torch.nan)], dim=2).requires_grad_()
        own = x.clone().requires_grad_()
        output = layer(padded, mask=(torch.arange(10) < 5).expand(6, 10))[..., :5]
        expected = twin(own)
        torch.testing.assert_close(output, expected)
        output.pow(3).sum().backward(), expected.pow(3).sum().backward()
        torch.testing.assert_close(padded.grad[..., :5], own.grad)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("masked_at", [0, 1, 4])
def test_a_batch_of_padding_alone_does_not_enter_the_averages(masked_at: int) -> None:
    """Not as zeros; before the window is full, and after."""
    layer = made(MovingAverageBatchNorm1d, window=3)
    twin = copy.deepcopy(layer)
    for step in range(7):
        x = torch.randn(6, 3, 5, dtype=torch.float64)
        if step == masked_at:
            padded = x.clone().requires_grad_()
            output = layer(padded, mask=torch.zeros(6, 5, dtype=torch.bool))
            output.sum().backward()
            assert not output.any()
            assert not padded.grad.any()
            twin.num_batches_tracked.add_(1)
        results = []
        for each in (layer, twin):
            own = x.clone().requires_grad_()
            output = each(own)
            output.pow(3).sum().backward()
            results.append((output, own.grad))
        torch.testing.assert_close(*results)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_what_cannot_run_its_backward_pass_is_refused() -> None:
    layer, x = MovingAverageBatchNorm2d(3), torch.randn(4, 3, 5, 5, requires_grad=True)
    with pytest.raises(UsageError, match=r"keeps averages of its backward pass.*use it in eval mode there"):
        grad(lambda x: layer(x).sum())(x)
    with pytest.raises(UsageError, match=r"use it in eval mode there"):
        torch.jit.trace(copy.deepcopy(layer), x)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    with pytest.raises(torch.jit.Error, match="script it in eval mode"):
        torch.jit.script(copy.deepcopy(layer))(x)
    layer.eval()
    torch.testing.assert_close(grad(lambda x: layer(x).sum())(x), torch.autograd.grad(layer(x).sum(), x)[0])
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # PyTorch's own, after a graph break
def test_compiles_copies_and_pickles() -> None:
    layer, x = made(MovingAverageBatchNorm2d).float(), torch.randn(4, 3, 5, 5)
    compiled = torch.compile(copy.deepcopy(layer), backend="eager")
    twins = [compiled, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = layer(x)
    for twin in twins:
        torch.testing.assert_close(twin(x), expected)


def test_half_precision_and_empty_batches() -> None:
    layer = MovingAverageBatchNorm2d(3).bfloat16()
    x = torch.randn(4, 3, 5, 5).bfloat16().requires_grad_()
    out = layer(x)
    out.float().square().sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    layer = MovingAverageBatchNorm2d(3)
    assert layer(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert (int(layer.num_batches_tracked), int(layer.batches_seen)) == (1, 0)


def test_settings_out_of_range_are_refused() -> None:
    for options in ({"window": 0}, {"r_max": 0.9}, {"d_max": -1.0}):
        with pytest.raises(UsageError, match="must be at least"):
            MovingAverageBatchNorm2d(3, **options)
    layer = made(MovingAverageBatchNorm2d)
    layer(torch.randn(2, 3, 4, 4, dtype=torch.float64)).sum().backward()
    layer.reset_running_stats()
    assert not layer.batch_vars.any()
    assert layer.batches_seen == layer.gradients_seen == 0
    assert "window=16, r_max=1.05, d_max=0.05" in repr(layer)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(MovingAverageBatchNorm1d, (2, 3, 4, 4)), (MovingAverageBatchNorm2d, (2, 3)), (MovingAverageBatchNorm, (3,))],
)
def test_refuses_inputs_of_other_dimensions(layer: type[MovingAverageBatchNorm], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        layer(3)(torch.randn(shape))

"""What Batch Renorm computes, against the paper's algorithm in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from bnprobe.nn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from bnprobe.nn.functional import batch_renorm
from support.renorm import Limits, algorithm_1

LAYERS = {1: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d}
PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPES = [(5, 3), (4, 3, 7), (3, 3, 4, 5), (2, 3, 2, 3, 4), (4, 3, 160, 160)]
CLIPPING = [Limits(), Limits(1.05, 0.1), Limits(1.0, 0.0), Limits(1e9, 1e9, momentum=0.3, eps=1e-2)]


def _state(channels: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Running mean, running variance, weight and bias, away from (0, 1, 1, 0); the second channel is far off."""
    mean, bias = 0.3 * torch.randn(2, channels, dtype=dtype)
    variance, weight = 0.5 + torch.rand(2, channels, dtype=dtype)
    mean[1] += 4
    variance[1] *= 30
    weight[0] *= -1
    return [mean, variance, weight, bias]


def _step(x: Tensor, state: list[Tensor], limits: Limits) -> list[Tensor]:
    """Output, buffers after, and gradients by input, weight and bias, of the function under test."""
    mean, variance = (buffer.clone() for buffer in state[:2])
    leaves = [leaf.clone(memory_format=torch.preserve_format).requires_grad_() for leaf in (x, *state[2:])]
    settings = {"momentum": limits.momentum, "eps": limits.eps, "r_max": limits.r_max, "d_max": limits.d_max}
    y = batch_renorm(leaves[0], mean, variance, *leaves[1:], training=True, **settings)
    return [y.detach(), mean, variance, *torch.autograd.grad(y, leaves, _seed(y))]


def _expected(x: Tensor, state: list[Tensor], limits: Limits) -> list[Tensor]:
    leaves = [leaf.double().requires_grad_() for leaf in (x, *state[2:])]
    y, mean, variance = algorithm_1(leaves[0], *state[:2], *leaves[1:], limits)
    return [y.detach(), mean, variance, *torch.autograd.grad(y, leaves, _seed(y))]


def _seed(y: Tensor) -> Tensor:
    """The same gradient by the output for both sides, whatever the dtype."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y)


@pytest.mark.parametrize("limits", CLIPPING)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_paper_in_float64(shape: tuple[int, ...], limits: Limits) -> None:
    x, state = 2 * torch.randn(shape, dtype=torch.float64) + 1, _state(shape[1])
    assert_close(_step(x, state, limits), _expected(x, state, limits), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("limits", CLIPPING)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_paper_in_float32(shape: tuple[int, ...], limits: Limits) -> None:
    x, state = 2 * torch.randn(shape) + 1, _state(shape[1], torch.float32)
    got = [tensor.double() for tensor in _step(x, state, limits)]
    expected = _expected(x, state, limits)
    scale = max(1.0, *(tensor.abs().max().item() for tensor in expected))
    assert_close(got, expected, rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((4, 16, 46, 47), torch.channels_last),
        ((2, 16, 16, 16, 17), torch.channels_last_3d),
        ((8200, 16), torch.contiguous_format),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_batches_with_adjacent_channels_agree_with_the_paper(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    x, state = (2 * torch.randn(shape, dtype=dtype) + 5).contiguous(memory_format=layout), _state(16, dtype)
    got, expected = _step(x, state, Limits(1.05, 0.1)), _expected(x, state, Limits(1.05, 0.1))
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for one, other in zip(got, expected, strict=True):
        assert_close(one.double(), other, rtol=tolerance, atol=tolerance * max(1.0, float(other.abs().max())))


@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 6), st.floats(1, 10), st.floats(0, 10), st.integers(0, 999))
def test_any_shape_and_limits(images: int, channels: int, positions: int, r: float, d: float, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(images, channels, positions, dtype=torch.float64) * 3 - 1
    state = [torch.randn(channels), torch.rand(channels) + 0.1, torch.randn(channels), torch.randn(channels)]
    state = [tensor.double() for tensor in state]
    limits = Limits(r, d)
    assert_close(_step(x, state, limits), _expected(x, state, limits), rtol=1e-8, atol=1e-9)


def _frozen_limits(x: Tensor, weight: Tensor, bias: Tensor, limits: Limits, at: Tensor, state: list[Tensor]) -> Tensor:
    """The output with r and d held at their values for ``at``, by finite differences' own means: plain operations."""
    axes = (0, *range(2, x.dim()))
    shape = (1, -1, *[1] * (x.dim() - 2))
    deviation = (at.var(axes, correction=0) + limits.eps).sqrt()
    running = (state[1] + limits.eps).sqrt()
    r = (deviation / running).clamp(1 / limits.r_max, limits.r_max)
    d = ((at.mean(axes) - state[0]) / running).clamp(-limits.d_max, limits.d_max)
    xhat = (x - x.mean(axes, keepdim=True)) / (x.var(axes, correction=0, keepdim=True) + limits.eps).sqrt()
    return (xhat * r.view(shape) + d.view(shape)) * weight.view(shape) + bias.view(shape)


@pytest.mark.parametrize("limits", CLIPPING)
def test_gradient_by_finite_differences_with_r_and_d_held(limits: Limits) -> None:
    x, state = torch.randn(3, 3, 2, 2, dtype=torch.float64), _state(3)
    _, _, _, grad_x, grad_weight, grad_bias = _step(x, state, limits)
    weight, bias = state[2:]

    def loss(x_: Tensor, weight_: Tensor, bias_: Tensor) -> Tensor:
        y = _frozen_limits(x_, weight_, bias_, limits, x, state)
        return (y * _seed(y)).sum()

    def slope(number: int, leaf: Tensor) -> Tensor:
        slopes, h = torch.zeros_like(leaf), 1e-5
        for index in range(leaf.numel()):
            step = torch.zeros_like(leaf).flatten()
            step[index] = h
            ends = []
            for sign in (1, -1):
                arguments = [x, weight, bias]
                arguments[number] = leaf + sign * step.reshape(leaf.shape)
                ends.append(loss(*arguments))
            slopes.flatten()[index] = (ends[0] - ends[1]) / (2 * h)
        return slopes

    for number, (leaf, gradient) in enumerate([(x, grad_x), (weight, grad_weight), (bias, grad_bias)]):
        assert_close(gradient, slope(number, leaf), rtol=1e-6, atol=1e-7)


def test_gradcheck_where_r_and_d_are_pinned_by_clipping() -> None:
    """At limits 1 and 0, r and d cannot move: there the paper's gradient is that of the function itself."""
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 2, dtype=torch.float64).unbind()
    mean, variance = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_renorm(x, mean.clone(), variance.clone(), weight, bias, True, r_max=1.0, d_max=0.0)

    inputs = (x, weight.clone().requires_grad_(), bias.clone().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_second_derivatives_agree_with_the_definition() -> None:
    x, state, limits = torch.randn(3, 3, 2, 2, dtype=torch.float64), _state(3), Limits(1.3, 0.4)
    penalties = []
    for run in ("ours", "reference"):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, *state[2:])]
        mean, variance = (buffer.clone() for buffer in state[:2])
        if run == "ours":
            y = batch_renorm(leaves[0], mean, variance, *leaves[1:], training=True, r_max=1.3, d_max=0.4)
        else:
            y = algorithm_1(leaves[0], mean, variance, *leaves[1:], limits)[0]
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), leaves[:1], create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), leaves[:2]))
    assert_close(penalties[0], penalties[1], rtol=1e-7, atol=1e-8)


def test_gradients_by_the_input_sum_to_zero_and_are_orthogonal_to_it() -> None:
    """Shifting x changes nothing, and stretching it only through eps; both because r and d are constants."""
    x, state = torch.randn(4, 3, 5, dtype=torch.float64), _state(3)
    gradient = _step(x, state, Limits(eps=1e-9))[3]
    assert_close(gradient.sum((0, 2)), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close((gradient * x).sum((0, 2)), torch.zeros(3, dtype=torch.float64), atol=1e-7, rtol=0)
    assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_limits_one_and_zero_are_batch_norm(shape: tuple[int, ...]) -> None:
    dimensions = max(1, len(shape) - 2)
    ours, plain = LAYERS[dimensions](3, momentum=0.1, r_max=1, d_max=0), PLAIN[dimensions](3)
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(shape) * 2 + 1
    results = []
    for layer in (ours, plain):
        leaf = x.clone().requires_grad_()
        for _ in range(3):
            y = layer(leaf)
        gradients = torch.autograd.grad(y, (leaf, layer.weight, layer.bias), _seed(y))
        results.append([y, *gradients, layer.running_mean, layer.running_var])
    scale = float(results[1][2].abs().max())
    assert_close(results[0], results[1], rtol=1e-5, atol=1e-6 * max(1.0, scale))
    assert ours.num_batches_tracked == plain.num_batches_tracked == 3


@pytest.mark.parametrize("shape", SHAPES)
def test_unclipped_training_output_is_the_eval_output_before_the_update(shape: tuple[int, ...]) -> None:
    layer = LAYERS[max(1, len(shape) - 2)](3, r_max=1e6, d_max=1e6).double()
    with torch.no_grad():
        for tensor, value in zip(
            (layer.running_mean, layer.running_var, layer.weight, layer.bias), _state(3), strict=True
        ):
            tensor.copy_(value)
    x = torch.randn(shape, dtype=torch.float64)
    before = layer.eval()(x)
    assert_close(layer.train()(x), before)
    assert not torch.allclose(layer.eval()(x), before)


def test_the_running_variance_is_corrected_over_images_and_positions() -> None:
    """torchrl corrects by the number of images alone."""
    layer, x = BatchRenorm2d(1, momentum=1.0), torch.randn(2, 1, 3, 3)
    layer(x)
    assert_close(layer.running_var, x.var().reshape(1))


def test_one_value_per_channel_is_normalized_by_the_running_statistics() -> None:
    layer = BatchRenorm1d(2, momentum=0.5)
    layer.running_mean.copy_(torch.tensor([1.0, 2.0]))
    layer.running_var.copy_(torch.tensor([4.0, 0.25]))
    x = torch.tensor([[2.0, 1.5]], requires_grad=True)
    y = layer(x)
    assert_close(y, torch.tensor([[0.5, -1.0]]), atol=1e-4, rtol=0)
    assert_close(layer.running_mean, torch.tensor([1.5, 1.75]))
    assert_close(layer.running_var, torch.tensor([4.0, 0.25]))  # one value has no variance
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_a_constant_channel_has_finite_gradients() -> None:
    """sb3-contrib gives NaN."""
    layer, x = BatchRenorm1d(2), torch.randn(4, 2)
    x[:, 1] = 3.0
    x.requires_grad_()
    (layer(x) * torch.randn(4, 2)).sum().backward()
    for gradient in (x.grad, layer.weight.grad, layer.bias.grad):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(6, 2), (32, 2, 40, 40)])
def test_float32_variance_does_not_cancel_far_from_zero(shape: tuple[int, ...]) -> None:
    layer, x = LAYERS[max(1, len(shape) - 2)](2, momentum=1.0), 1000 + 0.01 * torch.randn(shape)
    layer(x)
    axes = (0, *range(2, x.dim()))
    assert_close(layer.running_var.double(), x.double().var(axes), rtol=1e-4, atol=0)


def test_float32_squares_do_not_overflow() -> None:
    layer, x = BatchRenorm2d(2, momentum=1.0), 1e19 * torch.randn(32, 2, 40, 40)
    layer.running_var.fill_(1e38)
    assert torch.isfinite(layer(x)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_stay_visible(bad: float) -> None:
    layer, x = BatchRenorm2d(2), torch.randn(32, 2, 40, 40)
    x[0, 1, 0, 0] = bad
    y = layer(x)
    assert not torch.isfinite(y[:, 1]).all()
    assert torch.isfinite(y[:, 0]).all()


def test_an_empty_batch_changes_nothing() -> None:
    layer = BatchRenorm2d(3)
    assert layer(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_eps_must_be_positive_in_training() -> None:
    with pytest.raises(ValueError, match="positive eps"):
        batch_renorm(torch.randn(2, 3), torch.zeros(3), torch.ones(3), training=True, eps=0.0)


def test_inference_is_batch_norm() -> None:
    x, state = torch.randn(4, 3, 5), _state(3, torch.float32)
    assert torch.equal(batch_renorm(x, *state), F.batch_norm(x, *state, training=False))


@pytest.mark.parametrize("training", [True, False])
def test_a_function_mode_can_answer_in_its_place(training: bool) -> None:
    calls = []

    class Interceptor(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is batch_renorm:
                calls.append((len(args), kwargs))
                return args[0]
            return func(*args, **(kwargs or {}))

    layer, x = BatchRenorm2d(3, r_max=2, d_max=4), torch.randn(2, 3, 4, 4)
    layer.train(training)
    with Interceptor():
        assert layer(x) is x
    ((positional, keywords),) = calls
    assert positional == 5
    assert keywords == {
        "training": training,
        "momentum": 0.01 if training else 0.0,
        "eps": 1e-5,
        "r_max": 2.0,
        "d_max": 4.0,
    }
    assert torch.equal(layer.running_mean, torch.zeros(3))

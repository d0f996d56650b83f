from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from bnprobe.errors import UsageError
from bnprobe.nn.cross_iteration import (
    CrossIterationBatchNorm,
    CrossIterationBatchNorm1d,
    CrossIterationBatchNorm2d,
    CrossIterationBatchNorm3d,
)
from bnprobe.repairs import deployable_state
from support.networks import unsettled

F64 = torch.float64


class Definition:
    """Equations 5 to 11 of the paper, with the raw input and the weights of every batch and derivatives by differences.

    A change of the bias shifts the values of an earlier batch.
    """

    def __init__(self, conv: nn.Module, layer: CrossIterationBatchNorm) -> None:
        self.conv, self.layer = copy.deepcopy(conv), layer
        self.batches: list[tuple[Tensor, Tensor, Tensor | float]] = []
        self.running_mean, self.running_var = layer.running_mean.clone(), layer.running_var.clone()

    def moments(self, source: Tensor, weight: Tensor, bias: Tensor | float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.conv.weight.copy_(weight)
            if self.conv.bias is not None:
                self.conv.bias.copy_(bias)
            values = self.conv(source).transpose(0, 1).flatten(1)
        return values.mean(1), values.square().mean(1)

    def compensated(self, source: Tensor, at: Tensor, bias: Tensor | float, now: Tensor) -> tuple[Tensor, Tensor]:
        """Both moments of a batch, expanded around its own weights."""
        step = 1e-3  # the second moment is a square: central differences are exact
        found = list(self.moments(source, at, bias))
        for position in range(at[0].numel()):
            each = torch.zeros_like(at).flatten(1)
            each[:, position] = step
            above, below = (self.moments(source, at + sign * each.view_as(at), bias) for sign in (1, -1))
            change = (now - at).flatten(1)[:, position]
            found = [old + (a - b) / (2 * step) * change for old, a, b in zip(found, above, below, strict=True)]
        return found[0], found[1]

    def __call__(self, source: Tensor, y: Tensor, conv: Any) -> Tensor:
        """The output for a batch, of which ``conv`` has made y; differentiable by y."""
        layer, now = self.layer, conv.weight.detach().clone()
        bias = 0.0 if conv.bias is None else conv.bias.detach().clone()
        values = y.transpose(0, 1).flatten(1)
        means, seconds = [values.mean(1)], [values.square().mean(1)]
        earlier = self.batches[::-1][: layer.window - 1] if len(self.batches) >= layer.burn_in else []
        for old, at, constant in earlier:
            mean, second = self.compensated(old.detach(), at, constant, now)
            shift = bias - constant
            means.append(mean + shift)
            seconds.append(second + 2 * shift * mean + shift**2)
        self.batches.append((source.detach().clone(), now, bias))
        mean = sum(means) / len(means)
        second = sum(torch.maximum(nu, mu**2) for nu, mu in zip(seconds, means, strict=True)) / len(means)
        variance = second - mean**2
        if values.shape[1] * len(means) == 1:
            mean, variance = self.running_mean.clone(), self.running_var.clone()
        self.running_mean += layer.momentum * (values.detach().mean(1) - self.running_mean)
        if values.shape[1] > 1:
            self.running_var += layer.momentum * (values.detach().var(1) - self.running_var)
        shape = (1, -1, *[1] * (y.dim() - 2))
        normalized = (y - mean.view(shape)) / (variance + layer.eps).sqrt().view(shape)
        return normalized * layer.weight.view(shape) + layer.bias.view(shape)


CASES: dict[str, tuple[Callable[[], nn.Module], type[CrossIterationBatchNorm], tuple[int, ...]]] = {
    "2d": (lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False), CrossIterationBatchNorm2d, (2, 3, 4, 5)),
    "strided": (lambda: nn.Conv2d(4, 4, 2, stride=2, dilation=2, groups=2), CrossIterationBatchNorm2d, (3, 4, 6, 5)),
    "depthwise, same": (
        lambda: nn.Conv2d(4, 4, (3, 2), padding="same", padding_mode="reflect", groups=4),
        CrossIterationBatchNorm2d,
        (2, 4, 5, 4),
    ),
    "1d": (lambda: nn.Conv1d(2, 4, 3, padding=2, padding_mode="circular"), CrossIterationBatchNorm1d, (2, 2, 6)),
    "3d": (lambda: nn.Conv3d(2, 4, 2), CrossIterationBatchNorm3d, (2, 2, 3, 3, 4)),
    "linear": (lambda: nn.Linear(5, 4), CrossIterationBatchNorm1d, (3, 5)),
    "one value": (lambda: nn.Linear(5, 4), CrossIterationBatchNorm1d, (1, 5)),
    "any dimensions": (lambda: nn.Conv2d(3, 4, 1), CrossIterationBatchNorm, (2, 3, 3, 3)),
}
every_case = pytest.mark.parametrize("case", CASES)


def made(case: str = "2d", **options: Any) -> tuple[nn.Sequential, tuple[int, ...]]:
    """A convolution and the layer that follows it, in train mode, and the shape of a batch."""
    torch.manual_seed(0)
    convolution, kind, shape = CASES[case]
    conv = convolution().double()
    layer = unsettled(kind(4, dtype=F64, **{"momentum": 0.3, "window": 3, **options}))
    return nn.Sequential(conv, layer.follow(conv)).train(), shape


def batches(shape: tuple[int, ...], number: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [1 + 2 * torch.randn(shape, dtype=F64, generator=generator) for _ in range(number)]


def change(net: nn.Module, size: float = 0.05) -> None:
    """As an optimizer would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net[0].parameters():
            parameter += size * torch.randn(parameter.shape, dtype=F64, generator=generator).to(parameter)


@every_case
@pytest.mark.parametrize("options", [{"window": 1}, {"window": 3}, {"window": 3, "burn_in": 4}])
def test_output_and_gradients_are_those_of_the_definition(case: str, options: dict[str, int]) -> None:
    """Over more batches than the window holds, with weights that change between them."""
    net, shape = made(case, **options)
    expected = Definition(net[0], net[1])
    for x in batches(shape):
        x.requires_grad_()
        out = net(x)
        theirs = expected(x, net[0](x), net[0])
        net[0]._handed_over = None
        torch.testing.assert_close(out, theirs, rtol=1e-8, atol=1e-9)
        upstream = torch.randn(out.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
        leaves = [x, *net.parameters()]
        gradients = [torch.autograd.grad(y, leaves, upstream, retain_graph=True) for y in (out, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-8)
        change(net)
    torch.testing.assert_close(net[1].running_mean, expected.running_mean)
    torch.testing.assert_close(net[1].running_var, expected.running_var)
    assert net[1].batches_seen == 7


def test_the_gradient_is_the_derivative_of_the_output() -> None:
    """With earlier batches in the window, which are constants."""
    net, shape = made()
    first, second, x = batches(shape, 3)
    for each in (first, second):
        net(each)
        change(net)

    def output(x: Tensor) -> Tensor:
        return copy.deepcopy(net)(x)

    assert torch.autograd.gradcheck(output, x.requires_grad_())


def test_a_window_of_one_and_the_burn_in_are_bn() -> None:
    for options in ({"window": 1}, {"window": 8, "burn_in": 3}):
        net, shape = made(**options)
        bn = nn.BatchNorm2d(4, momentum=0.3, dtype=F64)
        bn.load_state_dict(deployable_state(net[1], bn))
        for x in batches(shape, 3):
            y = net[0](x)
            net[0]._handed_over = None
            torch.testing.assert_close(net(x), bn(y))
            change(net)
        torch.testing.assert_close(deployable_state(net[1], bn), dict(bn.state_dict()))
        torch.testing.assert_close(net.eval()(x), bn.eval()(net[0](x)))


def test_compensated_statistics_are_nearer_to_those_at_the_present_weights() -> None:
    """Than an average over batches of other weights."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 64, 3, bias=False)
    net = nn.Sequential(conv, CrossIterationBatchNorm2d(64, window=8, affine=False).follow(conv))
    inputs = [1 + torch.randn(1, 8, 6, 6) for _ in range(8)]
    direction = 0.002 * torch.randn_like(conv.weight)
    then = []
    with torch.no_grad():
        for x in inputs:
            y = conv(x)
            then.append(y)
            out = net(x)
            if x is not inputs[-1]:
                conv.weight += direction
        now = [conv(x) for x in inputs]

        def normalized(batches: list[Tensor]) -> Tensor:
            """The last batch with the moments of all."""
            values = torch.cat(batches).transpose(0, 1).flatten(1)
            mean, std = (each.view(1, -1, 1, 1) for each in (values.mean(1), values.std(1, correction=0)))
            return (y - mean) / std

    errors = [(each - normalized(now)).abs().mean() for each in (out, normalized(then))]
    assert errors[0] < errors[1] / 5


def test_a_large_mean_does_not_cancel() -> None:
    """The paper's mean of squares less the square of the mean would be noise here."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 1)
    nn.init.ones_(conv.weight)
    net = nn.Sequential(conv, CrossIterationBatchNorm2d(3, window=4, affine=False).follow(conv))
    for _ in range(6):
        out = net(500 + torch.randn(4, 2, 8, 8) * 0.1)
        assert float(out.detach().std()) == pytest.approx(1, rel=0.2)


def test_a_resumed_run_goes_on_to_the_same_bits() -> None:
    net, shape = made()
    net = net.float()
    inputs = [x.float() for x in batches(shape, 9)]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        optimizer.zero_grad()
        out: Tensor = net(x)
        out.pow(3).mean().backward()
        optimizer.step()
        return out

    for x in inputs[:5]:
        step(net, optimizer, x)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other, _ = made()
    other = other.float()
    other.load_state_dict(torch.load(file, weights_only=True))
    other_optimizer = torch.optim.SGD(other.parameters(), 0.1)
    for x in inputs[5:]:
        assert torch.equal(step(net, optimizer, x), step(other, other_optimizer, x))
    for key, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[key])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_follow_their_own_convolution(copied: Callable[[nn.Module], nn.Module]) -> None:
    net, shape = made()
    inputs = batches(shape, 4)
    net(inputs[0])
    twin = copied(net)
    assert twin[1]._followed[0] is twin[0]
    assert twin[1]._followed[0] is not net[0]
    for x in inputs[1:]:
        for each in (net, twin):
            change(each)
        torch.testing.assert_close(twin(x), net(x), rtol=0, atol=0)
    with torch.no_grad():
        twin[0].weight.mul_(2)
    assert not torch.allclose(twin(x), net(x))
    moved = net.to(torch.float32, memory_format=torch.channels_last)
    assert {buffer.dtype for buffer in moved[1].buffers()} == {torch.float32, torch.int64}
    assert moved(inputs[0].float()).is_contiguous(memory_format=torch.channels_last)


def test_keys_are_those_of_bn_and_of_the_window() -> None:
    net, _ = made()
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "1.weight", "1.bias"]
    assert set(net[1].state_dict()) == {*nn.BatchNorm2d(4).state_dict(), *CrossIterationBatchNorm2d.training_only}
    assert set(CrossIterationBatchNorm2d(4).state_dict()) == set(nn.BatchNorm2d(4).state_dict())
    assert [name for name, _ in net.named_modules()] == ["", "0", "1"]
    net[1].follow(None)
    assert not net[0]._forward_hooks
    assert "_handed_over" not in vars(net[0])
    assert set(net[1].state_dict()) == set(nn.BatchNorm2d(4).state_dict())


def test_padding_does_not_count() -> None:
    nets = [made("1d", window=3)[0] for _ in range(2)]
    for net in nets:
        net[0] = nn.Conv1d(2, 4, 1, dtype=F64)
        net[0].load_state_dict(nets[0][0].state_dict())
        net[1].follow(net[0])
    mask = (torch.arange(10) < 6).expand(2, 10)
    for x in batches((2, 2, 6), 5):
        padded = torch.cat([x, torch.full((2, 2, 4), torch.nan, dtype=F64)], dim=2)
        output = nets[0][1](nets[0][0](padded), mask=mask)
        torch.testing.assert_close(output[..., :6], nets[1](x))
        for net in nets:
            change(net)
    torch.testing.assert_close(dict(nets[0][1].named_buffers()), dict(nets[1][1].named_buffers()))
    nets[0][1](nets[0][0](padded), mask=torch.zeros_like(mask))
    assert nets[0][1].batches_seen == 5
    torch.testing.assert_close(nets[0](x), nets[1](x))


def test_without_gradients_and_with_frozen_weights_the_window_moves_alike() -> None:
    nets = [made()[0] for _ in range(3)]
    nets[1].requires_grad_(False)
    for x in batches(CASES["2d"][2], 4):
        expected = nets[0](x)
        torch.testing.assert_close(nets[1](x), expected)
        with torch.no_grad():
            torch.testing.assert_close(nets[2](x), expected)
        for net in nets:
            change(net)
    states = [dict(net.state_dict()) for net in nets]
    torch.testing.assert_close(states[0], states[1])
    torch.testing.assert_close(states[0], states[2])


def test_half_precision_autocast_and_empty_batches() -> None:
    net, shape = made()
    net = net.to(torch.bfloat16)
    x = batches(shape, 1)[0].bfloat16().requires_grad_()
    out = net(x)
    out.float().square().sum().backward()
    assert out.dtype == x.grad.dtype == torch.bfloat16
    net, exact = made()[0].float(), made()[0].float()
    for x in batches(shape, 4):
        with torch.autocast("cpu", torch.bfloat16):
            out = net(x.float())
        torch.testing.assert_close(out.float(), exact(x.float()), rtol=0.05, atol=0.05)
        assert net[1].slopes.dtype == torch.float32
    net(torch.empty(0, *shape[1:]))
    assert (int(net[1].num_batches_tracked), int(net[1].batches_seen)) == (5, 4)


def test_training_is_refused_without_the_convolution() -> None:
    alone, x = CrossIterationBatchNorm2d(4), torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(alone.eval()(x), nn.BatchNorm2d(4).eval()(x))
    with pytest.raises(UsageError, match=r"does not know whose output it normalizes.*follow"):
        alone.train()(x)
    net, shape = made()
    x = batches(shape, 1)[0]
    y = net[0](x)
    net[1](y)
    with pytest.raises(UsageError, match="its Conv2d computes, but that was not called just before"):
        net[1](y)
    net[0](input=x)
    with pytest.raises(UsageError, match="positional"):
        net[1](y)
    with pytest.raises(UsageError, match="not called just before"):
        copy.deepcopy(net[1])(y)
    net[0](x)
    with pytest.raises(UsageError, match="the output must be passed on as it is"):
        net[1](y[:1])
    assert net[1].batches_seen == 1
    linear = nn.Linear(5, 4)
    layer = CrossIterationBatchNorm1d(4).follow(linear)
    with pytest.raises(UsageError, match="the output must be passed on as it is"):
        layer(linear(torch.randn(3, 4, 5)))


@pytest.mark.parametrize("spoil", [lambda y: y + 1, lambda y: y.relu(), lambda y: 2 * y])
def test_what_is_changed_on_the_way_is_noticed(spoil: Callable[[Tensor], Tensor]) -> None:
    net, shape = made("strided")
    net[0].register_forward_hook(lambda module, inputs, output: spoil(output))
    with pytest.raises(UsageError, match="does not get what its Conv2d computes"):
        net(batches(shape, 1)[0])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_scripts_and_traces_are_refused_in_training() -> None:
    net, shape = made()
    x = batches(shape, 1)[0]
    with pytest.raises(torch.jit.Error, match="script it in eval mode"):
        torch.jit.script(copy.deepcopy(net))(x)
    with pytest.raises(UsageError, match="trace it in eval mode"):
        torch.jit.trace(copy.deepcopy(net), x)
    torch.testing.assert_close(torch.jit.script(net.eval())(x), net(x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_training_is_the_same(backend: str) -> None:
    """What the backward pass computes again must not read a window that has moved on."""
    net, shape = made()
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for x in batches(shape, 5):
        for each, callee in ((net, net), (twin, compiled)):
            callee(x).pow(3).sum().backward()
            change(each)
        torch.testing.assert_close([p.grad for p in twin.parameters()], [p.grad for p in net.parameters()])
    torch.testing.assert_close(dict(twin.named_buffers()), dict(net.named_buffers()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_refused(reentrant: bool) -> None:
    net, shape = made()
    x = batches(shape, 1)[0].requires_grad_()
    out = checkpoint(net, x, use_reentrant=reentrant)
    with pytest.raises(UsageError, match=r"torch.utils.checkpoint.*Leave this layer out"):
        out.sum().backward()


def test_replicas_of_data_parallel_are_refused() -> None:
    net, shape = made()
    x = batches(shape, 1)[0]
    replica = net[1]._replicate_for_data_parallel()
    y = net[0](x)
    with pytest.raises(UsageError, match="DistributedDataParallel"):
        replica(y)


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


def _pruned() -> nn.Module:
    conv = nn.Conv2d(3, 4, 1)
    prune.random_unstructured(conv, "weight", 0.5)
    return conv


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: nn.ConvTranspose2d(3, 4, 1), "is transposed"),
        (lambda: nn.ReLU(), "is neither a convolution nor a linear module"),
        (lambda: nn.LazyConv2d(4, 1), "is lazy"),
        (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), "has no weight of its own"),
        (_pruned, "has no weight of its own"),
        (lambda: Standardized(3, 4, 1), "has a forward of its own"),
        (lambda: nn.Conv2d(3, 5, 1), "has 5 output channels, and the layer 4"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_cannot_be_followed_is_refused(module: Callable[[], nn.Module], reason: str) -> None:
    layer = CrossIterationBatchNorm2d(4)
    with pytest.raises(UsageError, match=f"CrossIterationBatchNorm2d cannot follow .*{reason}"):
        layer.follow(module())
    assert not layer._followed


def test_settings_out_of_range_are_refused() -> None:
    for options in ({"window": 0}, {"burn_in": -1}):
        with pytest.raises(UsageError, match="must be at least 1 and 0"):
            CrossIterationBatchNorm2d(3, **options)
    net, shape = made()
    net(batches(shape, 1)[0])
    net[1].reset_running_stats()
    assert not net[1].slopes.any()
    assert net[1].batches_seen == 0
    assert "window=3, burn_in=0" in repr(net)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(CrossIterationBatchNorm1d, (2, 3, 4, 4)), (CrossIterationBatchNorm2d, (2, 3)), (CrossIterationBatchNorm, (3,))],
)
def test_refuses_inputs_of_other_dimensions(layer: type[CrossIterationBatchNorm], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        layer(3)(torch.randn(shape))

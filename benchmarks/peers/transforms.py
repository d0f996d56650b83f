"""What PyTorch's tests of functorch and of forward-mode AD ask of modules with BN."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    replace_all_batch_norm_modules_,
    stack_module_state,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from benchmarks.peers.layers import Subject
from benchmarks.peers.registry import asks
from bnprobe.errors import UsageError

_SOURCE = "torch functorch"


def _tensors(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return dict(net.named_parameters()), dict(net.named_buffers())


def _loss(net: nn.Module) -> Callable[..., Tensor]:
    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(net, (parameters, buffers), (x,))
        return (output * torch.linspace(-1, 1, output[0].numel()).view(output[0].shape)).square().mean()

    return loss


@asks(_SOURCE)
def functional_gradients(subject: Subject) -> None:
    """``grad`` of a functional call is what autograd gives."""
    for training in subject.modes:
        net, twin = subject.net(training), subject.net(training)
        found = torch.func.grad(_loss(net))(*_tensors(net), subject.batch())
        loss = _loss(twin)(*_tensors(twin), subject.batch())
        expected = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True, materialize_grads=True)
        assert_close(list(found.values()), list(expected), rtol=1e-3, atol=1e-5)
        assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))


@asks(_SOURCE)
def ensembles(subject: Subject) -> None:
    """``vmap`` over stacked modules gives what each of them gives, buffers included."""
    for training in subject.modes:
        members, twins = ([subject.net(training) for _ in range(3)] for _ in range(2))
        for i in range(3):
            for net in (members[i], twins[i]):
                net[0].weight.data.mul_(1 + i)
        parameters, buffers = stack_module_state(members)
        base = members[0]
        found = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), (0, 0, None))(  # noqa: B023
            parameters, buffers, subject.batch()
        )
        assert_close(found, torch.stack([twin(subject.batch()) for twin in twins]), rtol=1e-3, atol=1e-4)
        for key, stacked in buffers.items():
            assert_close(stacked, torch.stack([dict(twin.named_buffers())[key] for twin in twins]))
        parameters, buffers = stack_module_state([subject.net(training) for _ in range(3)])
        vmap(torch.func.grad(_loss(base)), (0, 0, None))(parameters, buffers, subject.batch())


@asks(_SOURCE)
def gradients_per_sample(subject: Subject) -> None:
    """``vmap`` of ``grad`` over samples in eval mode gives the gradient of each sample."""
    net, x = subject.net(training=False), subject.batch(3)
    parameters, buffers = _tensors(net)

    def of_one(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return _loss(net)(parameters, buffers, sample[None])

    found = vmap(torch.func.grad(of_one), (None, 0))(parameters, x)
    for i in range(len(x)):
        one = torch.func.grad(of_one)(parameters, x[i])
        assert_close({name: value[i] for name, value in found.items()}, one, rtol=1e-3, atol=1e-5)


@asks(_SOURCE)
def jacobians(subject: Subject) -> None:
    """``jacrev``, ``jacfwd`` and ``vjp`` agree, in both modes."""
    for training in subject.modes:
        net, x = subject.net(training).double(), subject.batch(3, dtype=torch.float64)
        parameters, buffers = _tensors(net)

        def call(x: Tensor, net: Any = net, parameters: Any = parameters, buffers: Any = buffers) -> Tensor:
            fresh = {name: value.clone() for name, value in buffers.items()}
            axes = (0, *range(2, x.dim()))
            return functional_call(net, (parameters, fresh), (x,)).square().mean(axes)

        one, other = jacrev(call)(x), jacfwd(call)(x)
        assert_close(one, other)
        (pulled,) = vjp(call, x)[1](torch.ones(4, dtype=torch.float64))
        assert_close(pulled, one.sum(0))


@asks(_SOURCE)
def hessians(subject: Subject) -> None:
    """``hessian`` is that of nested autograd, and symmetric at inference."""
    for training in subject.modes:
        layer = subject.layer(training).double()
        x = subject.batch(2, dtype=torch.float64)[(..., *[slice(0, 2)] * subject.dimensions)].contiguous()
        parameters, buffers = _tensors(layer)

        def call(x: Tensor, layer: Any = layer, parameters: Any = parameters, buffers: Any = buffers) -> Tensor:
            fresh = {name: value.clone() for name, value in buffers.items()}
            return functional_call(layer, (parameters, fresh), (x,)).pow(3).sum()

        found = hessian(call)(x)
        expected = torch.autograd.functional.hessian(call, x)
        assert_close(found, expected, rtol=1e-6, atol=1e-8)
        if not training:
            square = found.reshape(x.numel(), -1)
            assert_close(square, square.T, rtol=1e-6, atol=1e-8)


@asks(_SOURCE)
def forward_mode(subject: Subject) -> None:
    """Dual numbers, ``jvp`` and ``linearize`` agree with the backward pass."""
    for training in subject.modes:
        net, x = subject.net(training).double(), subject.batch(dtype=torch.float64)
        direction = torch.randn_like(x)
        twin, leaf = copy.deepcopy(net), x.clone().requires_grad_()
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(copy.deepcopy(net)(forward_ad.make_dual(x, direction))).tangent
        upstream = torch.randn_like(tangent)
        (gradient,) = torch.autograd.grad(twin(leaf), leaf, upstream)
        assert_close((tangent * upstream).sum(), (gradient * direction).sum(), rtol=1e-9, atol=1e-10)
        if not training:
            assert_close(jvp(net, (x,), (direction,))[1], tangent)
            assert_close(linearize(net, x)[1](direction), tangent)


@asks(_SOURCE)
def functionalized(subject: Subject) -> None:
    """``functionalize`` and ``make_fx`` capture a step that gives the same output and buffers."""
    for training in subject.modes:
        net, twin = subject.net(training), subject.net(training)
        tensors = (*_tensors(net), subject.batch())

        def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
            fresh = {name: value.clone() for name, value in buffers.items()}
            return functional_call(net, (parameters, fresh), (x,)), fresh  # noqa: B023 (called in the loop)

        expected = twin(subject.batch())
        for capture in (make_fx(functionalize(call)), make_fx(call, tracing_mode="symbolic")):
            found, after = capture(*tensors)(*tensors)
            assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert_close(after, dict(twin.named_buffers()), rtol=1e-4, atol=1e-5)


@asks(_SOURCE)
def statistics_taken_away(subject: Subject) -> None:
    """After ``replace_all_batch_norm_modules_`` a layer works without statistics or says that it cannot."""
    net = subject.net()
    replace_all_batch_norm_modules_(net)
    try:
        y = net(subject.batch())
    except UsageError as error:
        if subject.family != "bn" and "replace_all_batch_norm_modules_" in str(error):
            return
        raise
    assert torch.isfinite(y).all()

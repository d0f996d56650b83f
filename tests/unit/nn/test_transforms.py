"""What PyTorch can do with ``nn.BatchNorm2d`` it can do with every layer of this package, in train and eval mode."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.testing import assert_close

from bnprobe.nn import (
    BatchRenorm1d,
    BatchRenorm2d,
    CrossIterationBatchNorm2d,
    DomainBatchNorm2d,
    ExampleWeighedBatchNorm2d,
    FrozenBatchNorm2d,
    GatedBatchNorm2d,
    GhostBatchNorm2d,
    InstanceRenorm2d,
    SyncBatchRenorm,
)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "bn": lambda: nn.BatchNorm2d(4),
    "renorm": lambda: BatchRenorm2d(4, r_max=1.2, d_max=0.3),
    "renorm, ghosts": lambda: BatchRenorm2d(4, virtual_batch_size=2),
    "renorm, as in keras": lambda: BatchRenorm2d(4, renorm_momentum=0.1, r_min=0.5),
    "renorm, deviations": lambda: BatchRenorm2d(4, running="std"),
    "sync": lambda: SyncBatchRenorm(4),
    "frozen": lambda: FrozenBatchNorm2d(4),
    "gated": lambda: GatedBatchNorm2d(4),
    "per domain": lambda: DomainBatchNorm2d(4, default_domain=1),
    "ghost": lambda: GhostBatchNorm2d(4, virtual_batch_size=2),
    "instance": lambda: InstanceRenorm2d(4),
    "example weighing": lambda: ExampleWeighedBatchNorm2d(4),
    "cross iteration": lambda: CrossIterationBatchNorm2d(4, window=3),
}

pytestmark = [  # PyTorch's own
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

every_layer = pytest.mark.parametrize("name", LAYERS)
both_modes = pytest.mark.parametrize("training", [True, False])


def _net(name: str, training: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), LAYERS[name](), nn.ReLU())
    if isinstance(net[1], CrossIterationBatchNorm2d):
        net[1].follow(net[0])
    for buffer in net.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.3)
    return net.train(training)


def _images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def _tensors(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return dict(net.named_parameters()), dict(net.named_buffers())


def _loss(net: nn.Module) -> Callable[..., Tensor]:
    weights = torch.linspace(-1, 1, 64).view(4, 4, 4)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(net, (parameters, buffers), (x,))
        return (output * weights).square().mean()

    return loss


@every_layer
@both_modes
def test_gradients_of_functional_calls_are_those_of_autograd(name: str, training: bool) -> None:
    net, twin = _net(name, training), _net(name, training)
    found = grad(_loss(net))(*_tensors(net), _images())
    loss = _loss(twin)(*_tensors(twin), _images())
    expected = torch.autograd.grad(loss, list(twin.parameters()), allow_unused=True, materialize_grads=True)
    assert_close(list(found.values()), list(expected), rtol=1e-4, atol=1e-6)
    assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))


@every_layer
@both_modes
def test_an_ensemble_is_its_members(name: str, training: bool) -> None:
    members, twins = ([_net(name, training) for _ in range(3)] for _ in range(2))
    for i, pair in enumerate(zip(members, twins, strict=True)):
        for net in pair:
            net[0].weight.data.mul_(1 + i)
    parameters, buffers = stack_module_state(members)
    base = members[0]
    found = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)), (0, 0, None))(parameters, buffers, _images())
    assert_close(found, torch.stack([twin(_images()) for twin in twins]), rtol=1e-4, atol=1e-5)
    for key, stacked in buffers.items():
        assert_close(stacked, torch.stack([dict(twin.named_buffers())[key] for twin in twins]))
    parameters, buffers = stack_module_state(members)
    vmap(grad(_loss(base)), (0, 0, None))(parameters, buffers, _images())


@every_layer
@both_modes
def test_forward_mode_agrees_with_finite_differences(name: str, training: bool) -> None:
    net, x = _net(name, training).double(), _images().double()
    direction = torch.randn_like(x)
    # r and d are constants for the gradient: a difference would move them. Limits of 1 and 0 fix them.
    for layer in net.modules():
        if hasattr(layer, "r_max"):
            layer.r_max, layer.d_max, layer._r_min = 1, 0, None
    if training and "instance" in name:
        net[1].blend = 1.0
    twin = copy.deepcopy(net)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x, direction))).tangent
    step = 1e-6
    states = [copy.deepcopy(twin) for _ in range(2)]
    difference = (states[0](x + step * direction) - states[1](x - step * direction)) / (2 * step)
    assert_close(tangent, difference, rtol=1e-5, atol=1e-6)
    if not training:
        assert_close(jvp(net, (x,), (direction,))[1], difference, rtol=1e-5, atol=1e-6)
        assert jacrev(lambda x: net(x).mean((0, 2, 3)))(x).shape == (4, *x.shape)


@every_layer
@both_modes
def test_forward_mode_agrees_with_the_backward_pass(name: str, training: bool) -> None:
    net, x = _net(name, training).double(), _images().double().requires_grad_()
    twin, direction, upstream = copy.deepcopy(net), torch.randn_like(x), torch.randn(4, 4, 4, 4).double()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(net(forward_ad.make_dual(x.detach(), direction))).tangent
    (gradient,) = torch.autograd.grad(twin(x), x, upstream)
    assert_close((tangent * upstream).sum(), (gradient * direction).sum(), rtol=1e-9, atol=1e-12)


@every_layer
@both_modes
def test_fx_keeps_the_layer_and_its_mode(name: str, training: bool) -> None:
    net, twin = _net(name, training), _net(name, training)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    traced = torch.fx.symbolic_trace(net)
    assert_close(dict(net.state_dict()), before)  # tracing counts no batch
    assert [node.op for node in traced.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    assert_close(traced(_images()), twin(_images()))
    assert_close(traced.eval()(_images()), twin.eval()(_images()))
    copied = copy.deepcopy(traced)
    assert_close(copied(_images()), twin(_images()))


@every_layer
def test_fx_within_other_modules_and_with_a_mask(name: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = _net(name)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.inner[0](x)
            output: Tensor = self.inner[1](y) if name == "bn" else self.inner[1](y, mask=mask)
            return output

    net, mask = Masked(), torch.rand(4, 4, 4) > 0.3
    expected = copy.deepcopy(net)(_images(), mask)
    assert_close(torch.fx.symbolic_trace(net)(_images(), mask), expected)


@every_layer
@both_modes
def test_scripts_compute_the_same_and_can_be_saved(name: str, training: bool) -> None:
    if training and name == "cross iteration":
        pytest.skip("reads its convolution in training, which is another module of the script")
    net, twin = _net(name, training), _net(name, training)
    script = torch.jit.script(net)
    file = io.BytesIO()
    torch.jit.save(script, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for program in (script, loaded):
        other = copy.deepcopy(twin)
        x, y = (_images().requires_grad_() for _ in range(2))
        out, expected = program(x), other(y)
        assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert_close(dict(program.named_buffers()), dict(other.named_buffers()))
        gradients = [torch.autograd.grad(z.square().sum(), leaf)[0] for z, leaf in ((out, x), (expected, y))]
        assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_scripts_take_masks_and_cumulative_averages() -> None:
    layer = BatchRenorm1d(3, momentum=None)
    script, x, mask = torch.jit.script(copy.deepcopy(layer)), torch.randn(5, 3, 7), torch.rand(5, 7) > 0.4
    for _ in range(3):
        assert_close(script(x, mask), layer(x, mask))
    assert_close(dict(script.named_buffers()), dict(layer.named_buffers()))
    with pytest.raises(torch.jit.Error, match="expected a mask of shape"):
        script(x, mask[:2])


@every_layer
@both_modes
def test_traces_and_exports(name: str, training: bool) -> None:
    net = _net(name, training)
    expected = copy.deepcopy(net)(_images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        if not (training and name == "cross iteration"):  # which refuses it
            traced = torch.jit.trace(copy.deepcopy(net), _images(), check_trace=False)
            assert traced(_images()).shape == expected.shape
    exported: Any = torch.export.export(copy.deepcopy(net), (_images(),))
    assert_close(exported.module(check_guards=False)(_images()), expected, rtol=1e-4, atol=1e-5)


@every_layer
@both_modes
def test_hessians_are_those_of_autograd(name: str, training: bool) -> None:
    layer, x = _net(name, training)[1].double(), torch.randn(2, 4, 2, 1, dtype=torch.float64)
    if name == "cross iteration":
        layer, x = _net(name, training)[:2].double(), torch.randn(2, 3, 3, 4, dtype=torch.float64)
    parameters, buffers = _tensors(layer)

    def loss(x: Tensor) -> Tensor:
        output: Tensor = functional_call(layer, (parameters, {key: b.clone() for key, b in buffers.items()}), (x,))
        return output.pow(3).sum()

    assert_close(hessian(loss)(x), torch.autograd.functional.hessian(loss, x), rtol=1e-6, atol=1e-8)


@every_layer
@both_modes
def test_the_meta_device_gives_shapes(name: str, training: bool) -> None:
    net = _net(name, training).to("meta")
    assert net(_images().to("meta")).shape == (4, 4, 4, 4)


@every_layer
def test_the_joint_graph_is_captured(name: str) -> None:
    from torch._functorch.aot_autograd import aot_export_module

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net(name)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.net(x).square().mean(),)

    graph, _ = aot_export_module(Loss(), [_images()], trace_joint=True, output_loss_index=0)
    assert any(node.op == "call_function" for node in graph.graph.nodes)

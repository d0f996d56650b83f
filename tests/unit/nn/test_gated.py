from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from bnprobe.errors import UsageError
from bnprobe.nn.gated import GatedBatchNorm, GatedBatchNorm1d, GatedBatchNorm2d, GatedBatchNorm3d
from bnprobe.repairs import deployable_state
from support.networks import unsettled

SHAPES = [
    (GatedBatchNorm1d, nn.BatchNorm1d, (4, 3)),
    (GatedBatchNorm1d, nn.BatchNorm1d, (4, 3, 5)),
    (GatedBatchNorm2d, nn.BatchNorm2d, (1, 3, 5, 6)),
    (GatedBatchNorm3d, nn.BatchNorm3d, (2, 3, 3, 2, 2)),
]


def definition(layer: GatedBatchNorm, x: Tensor) -> Tensor:
    """The docstring's formula, with autograd through all of it but the running statistics."""
    axes = [0, *range(2, x.dim())]
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean = x.mean(axes)
    variance = ((x - mean.view(shape)) ** 2).mean(axes)
    z_batch = (x - mean.view(shape)) / (variance + layer.eps).sqrt().view(shape)
    running = (layer.running_mean.clone().view(shape), (layer.running_var.clone() + layer.eps).sqrt().view(shape))
    z_running = (x - running[0]) / running[1]
    gate = layer.gate_logit.sigmoid().view(shape)
    z = gate * z_batch + (1 - gate) * z_running
    return z if layer.weight is None else layer.weight.view(shape) * z + layer.bias.view(shape)


def made(kind: type[GatedBatchNorm], **options: object) -> GatedBatchNorm:
    layer = unsettled(kind(3, dtype=torch.float64, **options))
    nn.init.uniform_(layer.gate_logit, -2, 2)
    return layer.train()


@pytest.mark.parametrize(("kind", "plain", "shape"), SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_output_and_gradients_are_those_of_the_definition(
    kind: type[GatedBatchNorm], plain: type[nn.Module], shape: tuple[int, ...], affine: bool
) -> None:
    layer = made(kind, affine=affine)
    x = (3 + 2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    expected = definition(layer, x)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    out = layer(x)
    found = torch.autograd.grad(out, leaves, upstream)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "plain", "shape"), SHAPES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_as_in_bn(
    kind: type[GatedBatchNorm], plain: type[nn.Module], shape: tuple[int, ...], momentum: float | None
) -> None:
    layer, bn = kind(3, momentum=momentum), plain(3, momentum=momentum)
    for _ in range(3):
        x = 1 + torch.randn(shape)
        layer(x), bn(x)
    torch.testing.assert_close(layer.running_mean, bn.running_mean)
    torch.testing.assert_close(layer.running_var, bn.running_var)
    assert layer.num_batches_tracked == bn.num_batches_tracked == 3


def test_an_open_gate_is_bn_and_a_closed_one_inference() -> None:
    x = torch.randn(4, 3, 5, 5)
    bn = unsettled(nn.BatchNorm2d(3))
    layer = GatedBatchNorm2d(3)
    layer.load_state_dict({**bn.state_dict(), "gate_logit": torch.full((3,), 40.0)})
    inference = bn.eval()(x)
    torch.testing.assert_close(layer(x), bn.train()(x), rtol=1e-5, atol=1e-5)
    layer.load_state_dict({**unsettled(nn.BatchNorm2d(3)).state_dict(), "gate_logit": torch.full((3,), -40.0)})
    torch.testing.assert_close(layer(x), inference, rtol=1e-5, atol=1e-5)


def test_inference_is_that_of_bn_whatever_the_gate() -> None:
    layer = made(GatedBatchNorm2d).eval()
    bn = nn.BatchNorm2d(3, dtype=torch.float64).eval()
    bn.load_state_dict(deployable_state(layer, bn), strict=True)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(layer(x), bn(x))


def test_one_value_per_channel_is_normalized_by_the_running_statistics() -> None:
    layer = made(GatedBatchNorm1d)
    before = layer.running_mean.clone(), layer.running_var.clone()
    x = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    expected = F.batch_norm(x, *before, layer.weight, layer.bias)
    out = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (layer.weight / (before[1] + layer.eps).sqrt()).detach()[None])
    assert torch.equal(layer.gate_logit.grad, torch.zeros(3, dtype=torch.float64))  # there: DDP waits for it
    torch.testing.assert_close(layer.running_mean, 0.9 * before[0] + 0.1 * x.detach()[0])
    assert torch.equal(layer.running_var, before[1])


def test_constant_channels_have_finite_gradients() -> None:
    layer = GatedBatchNorm2d(3)
    x = torch.full((2, 3, 4, 4), 7.0, requires_grad=True)
    layer(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(layer.gate_logit.grad).all()


def test_large_means_cost_no_precision() -> None:
    x = 1e3 + torch.randn(8, 3, 6, 6, dtype=torch.float64)
    layer = GatedBatchNorm2d(3, dtype=torch.float64)
    layer.running_mean.fill_(1e3)
    narrow = copy.deepcopy(layer).float()
    torch.testing.assert_close(narrow(x.float()).double(), layer(x.float().double()), rtol=0, atol=1e-3)


def test_a_gate_learns_to_close_where_the_batch_misleads() -> None:
    torch.manual_seed(0)
    layer = GatedBatchNorm1d(2, affine=False, momentum=0.01)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = layer.gate.detach().clone()
    for _ in range(100):
        x = torch.randn(2, 2)
        optimizer.zero_grad()
        (layer(x) - x).square().mean().backward()  # the running statistics, (0, 1), know better
        optimizer.step()
    assert (layer.gate < 0.5 * before).all()


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
def test_gates_start_at_the_blend_and_can_learn(blend: float) -> None:
    layer = GatedBatchNorm2d(3, blend=blend)
    torch.testing.assert_close(layer.gate, torch.full((3,), blend), rtol=0, atol=1.1e-3)
    layer(torch.randn(2, 3, 4, 4)).square().sum().backward()
    assert (layer.gate_logit.grad != 0).all()


@pytest.mark.parametrize("blend", [-0.1, 1.1, float("nan")])
def test_a_blend_out_of_range_is_refused(blend: float) -> None:
    with pytest.raises(UsageError, match="blend is"):
        GatedBatchNorm2d(3, blend=blend)


def test_the_gate_is_the_only_key_beyond_bn() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(GatedBatchNorm2d(3)))
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.BatchNorm2d(3)))
    assert model.state_dict().keys() - plain.state_dict().keys() == {"1.0.gate_logit"}
    assert list(deployable_state(model, plain)) == list(plain.state_dict())


def test_memory_format_and_dtype_are_those_of_the_input() -> None:
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    layer, twin = GatedBatchNorm2d(3), GatedBatchNorm2d(3)
    out = layer(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, twin(x.contiguous()), rtol=1e-5, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        half = layer(x.to(dtype))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), layer(x.to(dtype).float()), rtol=2e-2, atol=2e-1)


def test_autocast_keeps_statistics_in_float32() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), GatedBatchNorm2d(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(100 + torch.randn(4, 3, 5, 5))
    assert out.dtype == torch.bfloat16
    assert model[1].running_mean.dtype == torch.float32
    out.float().sum().backward()
    assert model[1].gate_logit.grad.dtype == torch.float32


def test_twice_per_forward_back_propagates() -> None:
    layer = made(GatedBatchNorm2d)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    layer(layer(x)).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert layer.num_batches_tracked == 2


def test_an_empty_batch_is_counted_and_changes_nothing_else() -> None:
    layer = GatedBatchNorm2d(3)
    output = layer(torch.empty(0, 3, 4, 4))
    assert output.shape == (0, 3, 4, 4)
    output.sum().backward()
    assert torch.equal(layer.gate_logit.grad, torch.zeros(3))  # DDP waits for it
    assert layer.num_batches_tracked == 1  # as in BN
    assert torch.isfinite(layer.running_mean).all()


def test_compiles_copies_and_pickles() -> None:
    layer = made(GatedBatchNorm2d).float()
    x = torch.randn(2, 3, 4, 4)
    compiled = torch.compile(copy.deepcopy(layer), backend="eager", fullgraph=True)
    twins = [compiled, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    expected = layer(x)
    for twin in twins:
        torch.testing.assert_close(twin(x), expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (GatedBatchNorm1d, (2, 3, 4, 4)),
        (GatedBatchNorm2d, (2, 3)),
        (GatedBatchNorm3d, (2, 3, 4, 4)),
        (GatedBatchNorm, (3,)),
    ],
)
def test_refuses_inputs_of_other_dimensions(layer: type[GatedBatchNorm], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        layer(3)(torch.randn(shape))


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (1, 3, 1, 1)])
def test_cuda_gives_what_the_cpu_gives(shape: tuple[int, ...]) -> None:
    layer = unsettled(GatedBatchNorm2d(3))
    twin = copy.deepcopy(layer).cuda()
    x = torch.randn(shape)
    own, other = x.clone().requires_grad_(), x.cuda().requires_grad_()
    out, on_device = layer(own), twin(other)
    out.square().sum().backward()
    on_device.square().sum().backward()
    torch.testing.assert_close(on_device.cpu(), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.grad.cpu(), own.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twin.running_var.cpu(), layer.running_var)


def test_a_reset_brings_the_first_gates_back() -> None:
    layer = GatedBatchNorm2d(3, blend=0.3, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    assert_close(dict(layer.state_dict()), dict(GatedBatchNorm2d(3, blend=0.3).state_dict()))

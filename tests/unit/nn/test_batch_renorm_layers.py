"""Batch Renorm layers as modules: names, formats, dtypes, copies, compilation, DDP's and autocast's habits."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

from bnprobe.errors import UsageError
from bnprobe.nn import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, RenormSchedule, SyncBatchRenorm
from bnprobe.nn.functional import batch_renorm

HEADERS = Path(sysconfig.get_path("include")) / "Python.h"
CAN_COMPILE = shutil.which("g++") is not None and HEADERS.exists() and " " not in sys.prefix

PAIRS = [(BatchRenorm1d, nn.BatchNorm1d), (BatchRenorm2d, nn.BatchNorm2d), (BatchRenorm3d, nn.BatchNorm3d)]


def _moved(layer: _BatchNorm) -> _BatchNorm:
    """With running statistics and parameters that show in every output."""
    with torch.no_grad():
        for tensor in (*layer.parameters(), layer.running_mean):
            tensor.copy_(torch.randn(tensor.shape))
        layer.running_var.copy_(torch.rand(layer.num_features) + 0.5)
    return layer


@pytest.mark.parametrize(("renorm", "plain"), [*PAIRS, (SyncBatchRenorm, nn.BatchNorm2d)])
@pytest.mark.parametrize("affine", [True, False])
def test_weights_load_strictly_both_ways(renorm: type, plain: type, affine: bool) -> None:
    one, other = _moved(renorm(3, affine=affine)), plain(3, affine=affine)
    assert list(one.state_dict()) == list(other.state_dict())
    other.load_state_dict(one.state_dict(), strict=True)
    back = renorm(3, affine=affine)
    back.load_state_dict(other.state_dict(), strict=True)
    assert_close(dict(back.state_dict()), dict(one.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(("renorm", "plain"), PAIRS)
def test_deploys_as_plain_batch_norm(renorm: type, plain: type) -> None:
    one, other = _moved(renorm(3)), plain(3)
    other.load_state_dict(one.state_dict())
    x = torch.randn(4, 3, *[5] * (one.dimensions[1] - 2))
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_without_affine_there_are_no_parameters() -> None:
    layer = BatchRenorm2d(3, affine=False)
    assert not list(layer.parameters())
    assert layer(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    assert layer.weight is None


@pytest.mark.parametrize(("renorm", "plain"), [*PAIRS, (SyncBatchRenorm, _BatchNorm)])
def test_is_a_batch_norm_layer(renorm: type, plain: type) -> None:
    """Weight-decay filters and code that freezes or initializes look for torch's own classes."""
    assert isinstance(renorm(2), plain)


@pytest.mark.parametrize(
    ("layer", "dimensions"),
    [
        (BatchRenorm1d, (2, 3)),
        (BatchRenorm2d, (4,)),
        (BatchRenorm3d, (5,)),
        (SyncBatchRenorm, (2, 3, 4, 5)),
    ],
)
def test_other_dimensions_are_refused(layer: type, dimensions: tuple[int, ...]) -> None:
    for count in range(1, 7):
        x = torch.randn([3] * count)
        if count in dimensions:
            assert layer(3)(x).shape == x.shape
        else:
            with pytest.raises(ValueError, match=rf"expected .*D input \(got {count}D input"):
                layer(3)(x)


@pytest.mark.parametrize("momentum", [None, 0.1, 1.0])
def test_running_statistics_move_as_in_batch_norm(momentum: float | None) -> None:
    ours, plain = BatchRenorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for _ in range(4):
        x = torch.randn(2, 3, 4, 4) + 1
        ours(x)
        plain(x)
    assert_close(dict(ours.state_dict()), dict(plain.state_dict()))


def test_statistics_move_without_grad_and_when_frozen_too() -> None:
    """As in BN: neither no_grad nor requires_grad=False stops them."""
    layer, plain = BatchRenorm2d(3).requires_grad_(False), nn.BatchNorm2d(3, momentum=0.01)
    x = torch.randn(2, 3, 4, 4) + 1
    assert not layer(x).requires_grad
    with torch.no_grad():
        layer(x), plain(x), plain(x)
    assert_close(layer.running_mean, plain.running_mean)
    layer.eval()(x)
    assert_close(layer.running_mean, plain.running_mean)


@pytest.mark.parametrize("wanted", ["input", "weight", "bias", "weight and bias"])
def test_only_the_gradients_that_are_needed(wanted: str) -> None:
    results = []
    for needed in (wanted, "input, weight and bias"):
        torch.manual_seed(1)
        layer, x = _moved(BatchRenorm2d(3)), torch.randn(2, 3, 4, 4)
        leaves = {"input": x, "weight": layer.weight, "bias": layer.bias}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in needed)
        (layer(x) * torch.randn(2, 3, 4, 4)).sum().backward()
        results.append({name: leaf.grad for name, leaf in leaves.items() if name in wanted})
        assert all((leaf.grad is not None) == (name in needed) for name, leaf in leaves.items())
    assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("layer", "shape", "layout"),
    [
        (BatchRenorm2d, (3, 4, 6, 5), torch.channels_last),
        (BatchRenorm2d, (8, 4, 64, 64), torch.channels_last),
        (BatchRenorm3d, (2, 4, 3, 6, 5), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize("gradient_layout", ["same", "contiguous", "expanded"])
def test_channels_last_is_kept(
    layer: type, shape: tuple[int, ...], layout: torch.memory_format, gradient_layout: str
) -> None:
    x, gradient = torch.randn(shape), torch.randn(shape)
    if gradient_layout == "expanded":
        gradient = torch.ones(()).expand(shape)
    renorm = _moved(layer(4))
    results = []
    for given in (x.contiguous(memory_format=layout), x):
        one, leaf = copy.deepcopy(renorm), given.clone(memory_format=torch.preserve_format).requires_grad_()
        y = one(leaf)
        assert y.stride() == given.stride()
        seed = gradient.contiguous(memory_format=layout) if gradient_layout == "same" else gradient
        y.backward(seed)
        assert leaf.grad.stride() == given.stride()
        results.append([y, leaf.grad, one.weight.grad, one.bias.grad, one.running_mean, one.running_var])
    assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)


def test_neither_contiguous_nor_channels_last() -> None:
    layer, x = _moved(BatchRenorm1d(4)), torch.randn(3, 7, 4)
    twin = copy.deepcopy(layer)
    assert_close(layer(x.transpose(1, 2)), twin(x.transpose(1, 2).contiguous()))
    assert_close(layer.running_var, twin.running_var)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_layer", [True, False])
def test_half_precision_keeps_wide_statistics(dtype: torch.dtype, half_layer: bool) -> None:
    layer, wide = _moved(BatchRenorm2d(3)), BatchRenorm2d(3)
    wide.load_state_dict(layer.state_dict())
    x = (torch.randn(4, 3, 8, 8) + 1).to(dtype)
    if half_layer:
        layer = layer.to(dtype)
    results = []
    for one, given in ((layer, x), (wide, x.float())):
        leaf = given.clone().requires_grad_()
        y = one(leaf)
        (y.float() * torch.linspace(-1, 1, 8)).sum().backward()
        assert y.dtype == leaf.grad.dtype == given.dtype
        assert one.weight.grad.dtype == one.weight.dtype
        results.append([tensor.float() for tensor in (y, leaf.grad, one.running_mean, one.running_var)])
    assert_close(results[0], results[1], rtol=0.05, atol=0.03)
    if not half_layer:
        assert_close(layer.running_var, wide.running_var, rtol=1e-4, atol=0)


def test_float64() -> None:
    layer = BatchRenorm1d(2, dtype=torch.float64)
    assert layer(torch.randn(4, 2, dtype=torch.float64)).dtype == layer.running_mean.dtype == torch.float64


def test_autocast() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchRenorm2d(4), nn.Conv2d(4, 2, 3))
    twin, x = copy.deepcopy(net), torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
    y.float().square().sum().backward()
    twin(x).square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert net[1].running_mean.dtype == torch.float32
    assert_close(net[1].weight.grad, twin[1].weight.grad, rtol=0.1, atol=0.5)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_in_one_graph_that_follows_the_limits() -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Conv2d(2, 3, 3), _moved(BatchRenorm2d(3)), nn.ReLU(), BatchRenorm2d(3, momentum=None))
    twin, schedule = copy.deepcopy(net), RenormSchedule(8, warmup=0.25, r_ramp=1.0, d_ramp=0.75)
    assert schedule.attach(net) == 2
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(9):
        for layer in (twin[1], twin[3]):
            layer.r_max, layer.d_max = schedule.r_max, schedule.d_max
        x, gradients = 5 * torch.randn(2, 2, 5, 5), []
        for model in (compiled, twin):
            y = model(x)
            gradients.append(torch.autograd.grad((y * torch.linspace(0, 1, 3)).sum(), list(model.parameters())))
        assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)
        assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))
        schedule.advance()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch's own, when inductor is imported
@pytest.mark.skipif(
    not CAN_COMPILE, reason="no C++ compiler, no Python.h, or a path with a space, which inductor cannot take"
)
@pytest.mark.parametrize(("affine", "masked"), [(True, False), (False, False), (True, True)])
def test_compiled_by_inductor(affine: bool, masked: bool) -> None:
    torch._dynamo.reset()
    mask = torch.arange(32).view(2, 4, 4) % 5 > 0 if masked else None
    layer, x = _moved(BatchRenorm2d(3, affine=affine, r_max=1.2, d_max=0.3)), torch.randn(2, 3, 4, 4)
    twin, results = copy.deepcopy(layer), []
    for model, one in ((torch.compile(layer, fullgraph=True), layer), (twin, twin)):
        leaf = x.clone().requires_grad_()
        y = model(leaf, mask)
        gradients = torch.autograd.grad((y * torch.linspace(-1, 1, 4)).sum(), [leaf, *one.parameters()])
        results.append([y, *gradients, one.running_mean, one.running_var])
    assert_close(results[0], results[1])
    assert_close(torch.compile(layer.eval(), fullgraph=True)(x), twin.eval()(x))


def test_limits_can_be_set_and_are_checked() -> None:
    layer = BatchRenorm2d(3)
    assert (layer.r_max, layer.d_max) == (3.0, 5.0)
    layer.r_max, layer.d_max = 2, 0
    assert (layer.r_max, layer.d_max) == (2.0, 0.0)
    for name, value in (("r_max", 0.99), ("r_max", float("nan")), ("d_max", -0.1), ("d_max", float("inf"))):
        with pytest.raises(UsageError, match=f"{name} is {value}, but must be a finite number of at least"):
            setattr(layer, name, value)
    with pytest.raises(UsageError, match=r"r_max is 0\.5"):
        BatchRenorm2d(3, r_max=0.5)
    assert (layer.r_max, layer.d_max) == (2.0, 0.0)
    assert "r_max=2, d_max=0" in repr(layer)


def test_limits_are_those_of_the_function() -> None:
    x, layer = 10 * torch.randn(4, 3) + 20, BatchRenorm1d(3, r_max=2, d_max=1)
    expected = batch_renorm(x, torch.zeros(3), torch.ones(3), training=True, r_max=2.0, d_max=1.0)
    assert_close(layer(x), expected)


def test_setting_a_limit_takes_a_layer_off_its_schedule() -> None:
    one, other = BatchRenorm2d(3), BatchRenorm2d(3)
    schedule = RenormSchedule(10)
    schedule.attach(nn.Sequential(one, other))
    assert (one.r_max, one.d_max) == (1.0, 0.0)
    one.r_max = 2
    assert (one.schedule, one.r_max, one.d_max) == (None, 2.0, 0.0)
    assert other.schedule is schedule


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
def test_copies_share_one_schedule_of_their_own(duplicate) -> None:
    net = nn.Sequential(BatchRenorm2d(3), BatchRenorm2d(3), SyncBatchRenorm(3))
    schedule = RenormSchedule(4, warmup=0, d_ramp=0.5)
    schedule.attach(net)
    schedule.advance()
    twin = duplicate(net)
    assert twin[0].schedule is twin[1].schedule is twin[2].schedule is not schedule
    twin[0].schedule.advance()
    assert (twin[1].d_max, net[1].d_max) == (5.0, 2.5)
    x = torch.randn(2, 3, 4, 4)
    while schedule.step < 2:
        schedule.advance()
    assert torch.equal(twin(x), net(x))


def test_a_subclass_that_activates_keeps_doing_it() -> None:
    class Activated(BatchRenorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    assert Activated(3)(torch.randn(2, 3, 4, 4)).min() == 0


def test_activation_checkpointing_gives_the_gradients_of_the_recomputation() -> None:
    """The second forward moves the statistics again, as in BN; it must not fail."""
    layer, x = BatchRenorm2d(3), torch.randn(2, 3, 4, 4, requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert layer.num_batches_tracked == 2
    assert torch.isfinite(x.grad).all()

"""What PyTorch's own surgery does to the layers: the right thing, or an error."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import replace_all_batch_norm_modules_
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

from bnprobe.errors import UsageError
from bnprobe.nn import (
    BatchRenorm2d,
    CrossIterationBatchNorm2d,
    DomainBatchNorm2d,
    ExampleWeighedBatchNorm2d,
    FrozenBatchNorm2d,
    GatedBatchNorm2d,
    GhostBatchNorm2d,
    InstanceRenorm2d,
    LazyBatchRenorm2d,
    MovingAverageBatchNorm2d,
    SyncBatchRenorm,
)

LAYERS: list[Callable[[], nn.Module]] = [
    lambda: BatchRenorm2d(4),
    lambda: SyncBatchRenorm(4),
    lambda: FrozenBatchNorm2d(4),
    lambda: GatedBatchNorm2d(4),
    lambda: InstanceRenorm2d(4),
    lambda: ExampleWeighedBatchNorm2d(4),
    lambda: GhostBatchNorm2d(4),
    lambda: MovingAverageBatchNorm2d(4),
    lambda: DomainBatchNorm2d(4, default_domain=0),
    lambda: CrossIterationBatchNorm2d(4),
]
BLENDED = (InstanceRenorm2d, ExampleWeighedBatchNorm2d)
WINDOWED = (MovingAverageBatchNorm2d, CrossIterationBatchNorm2d)
every_layer = pytest.mark.parametrize("layer", LAYERS)


@every_layer
def test_arguments_of_bn_that_the_layers_do_not_take_are_refused(layer: Callable[[], nn.Module]) -> None:
    """BN's fifth argument is ``track_running_stats``, where these layers have a number: True would be 1."""
    kind: Any = type(layer())
    for made in (
        lambda: kind(4, 1e-5, 0.1, True, True),
        lambda: kind(4, track_running_stats=True),
        lambda: kind(4, track_running_stats=False),
    ):
        with pytest.raises(UsageError, match=f"^{kind.__name__} does not take track_running_stats, the fifth argument"):
            made()
    with pytest.raises(UsageError, match=f"^{kind.__name__}: momentum is True, but must be a number"):
        kind(4, momentum=True)
    assert list(inspect.signature(kind).parameters)[:4] == ["num_features", "eps", "momentum", "affine"]


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: CrossIterationBatchNorm2d(4, window=2.5), "window is 2.5, but must be a whole number"),
        (lambda: MovingAverageBatchNorm2d(4, window="3"), "window is '3', but must be a whole number"),
        (lambda: DomainBatchNorm2d(4, domains=2.0), "domains is 2.0, but must be a whole number"),
        (lambda: GhostBatchNorm2d(4, virtual_batch_size=2.5), "virtual_batch_size is 2.5, but must be a whole"),
        (lambda: BatchRenorm2d(4, r_max="3"), "r_max is '3', but must be a number"),
        (lambda: InstanceRenorm2d(4, blend=True), "blend is True, but must be a number"),
        (lambda: MovingAverageBatchNorm2d(4, r_max=float("nan")), "r_max is nan and d_max is 0.05, but they must be"),
    ],
)
def test_settings_that_are_not_the_numbers_wanted_are_refused(make: Callable[[], nn.Module], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        make()


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    layer = CrossIterationBatchNorm2d(
        np.int64(4), momentum=np.float32(0.25), window=torch.tensor(3), burn_in=np.int8(2)
    )
    assert (layer.window, layer.burn_in) == (3, 2)


def test_a_lazy_layer_refuses_them_too() -> None:
    with pytest.raises(UsageError, match=r"^LazyBatchRenorm2d: r_max is True, but must be a number"):
        LazyBatchRenorm2d(r_max=True)
    with pytest.raises(UsageError, match=r"^LazyBatchRenorm2d does not take track_running_stats"):
        LazyBatchRenorm2d(track_running_stats=True)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"^LazyBatchRenorm2d: r_max is True"):
        LazyBatchRenorm2d(1e-5, 0.1, True, True)


def _net(layer: Callable[[], nn.Module]) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), layer(), nn.BatchNorm2d(4))
    if isinstance(net[1], CrossIterationBatchNorm2d):
        net[1].follow(net[0])
    net[1].running_mean.add_(0.3)
    net[1].running_var.mul_(2)
    return net


def _input(layer: nn.Module) -> Tensor:
    """A batch for a layer that stands alone, or behind a convolution if it follows one."""
    x = torch.randn(3, 4, 5, 5)
    if not isinstance(layer, CrossIterationBatchNorm2d):
        return x
    conv = nn.Conv2d(4, 4, 1)
    layer.follow(conv)
    return conv(x)


@every_layer
def test_conversion_to_plain_sync_bn_is_refused(layer: Callable[[], nn.Module]) -> None:
    net = _net(layer)
    with pytest.raises(UsageError, match=r"would turn \w+ into plain BN, which undoes the repair"):
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(net[1]) is type(layer())
    assert net[1].eps == 1e-5  # others may read it


@pytest.mark.parametrize(
    ("layer", "advice"),
    [
        (lambda: BatchRenorm2d(4), 'or convert them with to="sync".'),
        (lambda: SyncBatchRenorm(4), 'It is what to="sync" makes already, and needs no such call.'),
    ],
)
def test_what_is_synchronized_is_not_told_to_become_so(layer: Callable[[], nn.Module], advice: str) -> None:
    with pytest.raises(UsageError) as refused:
        nn.SyncBatchNorm.convert_sync_batchnorm(layer())
    assert str(refused.value).endswith(advice)


def convert_syncbn_model(module: nn.Module) -> nn.Module:
    """What apex.parallel does with every BN layer."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return nn.SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine)
    for name, child in module.named_children():
        module.add_module(name, convert_syncbn_model(child))
    return module


@every_layer
def test_so_is_that_of_other_packages(layer: Callable[[], nn.Module]) -> None:
    net = _net(layer)
    with pytest.raises(UsageError, match=r"^convert_syncbn_model would turn \w+ into plain BN"):
        convert_syncbn_model(net)
    assert type(net[1]) is type(layer())


@every_layer
def test_folding_into_a_convolution_is_right_or_refused(layer: Callable[[], nn.Module]) -> None:
    net, x = _net(layer).eval(), torch.randn(2, 3, 6, 6)
    if isinstance(net[1], BLENDED):
        kind = type(net[1]).__name__
        with pytest.raises(UsageError, match=f"cannot be folded into a convolution as BN can: it is {kind}"):
            fuse_conv_bn_eval(net[0], net[1])
        net[1].blend = 0
    if isinstance(net[1], DomainBatchNorm2d):
        with pytest.raises(UsageError, match="cannot be folded into a convolution as BN can: it keeps statistics for"):
            fuse_conv_bn_eval(net[0], net[1])
        return
    fused = fuse_conv_bn_eval(net[0], net[1])
    assert_close(fused(x), net[1](net[0](x)), rtol=1e-4, atol=1e-5)


def test_update_bn_leaves_frozen_statistics_and_renews_the_others() -> None:
    batches = [2 + 3 * torch.randn(8, 3, 6, 6) for _ in range(3)]
    frozen = _net(LAYERS[2])
    before = {key: value.clone() for key, value in frozen[1].state_dict().items()}
    update_bn(batches, frozen)
    assert_close(dict(frozen[1].state_dict()), before)
    renorm, plain = _net(LAYERS[0]), _net(lambda: nn.BatchNorm2d(4))
    plain.load_state_dict(renorm.state_dict())
    for net in (renorm, plain):
        update_bn(batches, net)
    assert_close(dict(renorm[1].named_buffers()), dict(plain[1].named_buffers()))


@every_layer
def test_lost_statistics_are_named(layer: Callable[[], nn.Module]) -> None:
    net = _net(layer)
    replace_all_batch_norm_modules_(net)
    with pytest.raises(UsageError, match=r"lost its running statistics.*replace_all_batch_norm_modules_"):
        net(torch.randn(2, 3, 6, 6))


@every_layer
def test_statistics_that_are_not_tracked_are_used_and_stay(layer: Callable[[], nn.Module]) -> None:
    net = layer()
    net.track_running_stats = False
    moving = net.training_only if isinstance(net, WINDOWED) else ()  # those of the last batches
    before = {key: value.clone() for key, value in net.named_buffers() if key not in moving}
    for training in (True, False):
        assert torch.isfinite(net.train(training)(_input(net))).all()
    assert_close({key: net.get_buffer(key) for key in before}, before)


@every_layer
def test_eps_is_checked_as_by_bn(layer: Callable[[], nn.Module]) -> None:
    net, x = layer(), torch.randn(3, 4, 5, 5)
    net.eps = -1e-5
    for training in (True, False):
        with pytest.raises(ValueError, match="needs an eps"):
            net.train(training)(x)
    net.eps = 0.0
    net.eval()(x)
    if not isinstance(net, FrozenBatchNorm2d):
        with pytest.raises(ValueError, match="needs an eps that is positive in training"):
            net.train()(x)


@every_layer
def test_a_bias_can_be_left_out(layer: Callable[[], nn.Module]) -> None:
    kind = type(layer())
    own, plain = kind(4, bias=False), nn.BatchNorm2d(4, bias=False)
    assert own.bias is None
    assert "bias=False" in repr(own)
    if kind is DomainBatchNorm2d:
        own.default_domain = 0
    if kind not in (GatedBatchNorm2d, DomainBatchNorm2d, MovingAverageBatchNorm2d):
        plain.load_state_dict(own.state_dict())
    x = _input(own)
    if kind not in BLENDED:
        assert_close(own.eval()(x), plain.eval()(x))
    own.train()(_input(own)).square().sum().backward()
    assert own.weight.grad is not None

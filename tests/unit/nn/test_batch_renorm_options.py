"""The options of Batch Renorm beyond the paper's: each against its definition in float64."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from bnprobe.errors import UsageError
from bnprobe.nn import (
    BatchRenorm1d,
    BatchRenorm2d,
    GatedBatchNorm1d,
    GhostBatchNorm1d,
    InstanceRenorm1d,
    LazyBatchRenorm1d,
    LazyBatchRenorm2d,
    LazyBatchRenorm3d,
    RenormSchedule,
    SyncBatchRenorm,
)
from bnprobe.nn.functional import batch_renorm
from bnprobe.repairs import deploy

EPS = 1e-5


def _by_hand(x: Tensor, mean: Tensor, variance: Tensor, r: tuple[float, float], d_max: float) -> Tensor:
    own, spread = x.mean((0, 2)), x.var((0, 2), correction=0)
    running, batch = (variance + EPS).sqrt(), (spread + EPS).sqrt()
    factor = (batch / running).clamp(*r).view(1, -1, 1)
    shift = ((own - mean) / running).clamp(-d_max, d_max).view(1, -1, 1)
    return (x - own.view(1, -1, 1)) / batch.view(1, -1, 1) * factor + shift


def _batch(scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return shift + scale * torch.randn(6, 3, 5, dtype=torch.float64)


def _layer(**settings: Any) -> BatchRenorm1d:
    layer = BatchRenorm1d(3, dtype=torch.float64, **settings)
    layer.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    layer.running_var.copy_(torch.tensor([2.0, 0.3, 9.0]))
    return layer


def test_r_has_a_lower_limit_of_its_own() -> None:
    layer, x = _layer(r_min=0.2, r_max=2.0), _batch(0.1)
    expected = _by_hand(x, layer.running_mean.clone(), layer.running_var.clone(), (0.2, 2.0), 5.0)
    assert_close(layer(x), expected)
    assert layer.r_min == 0.2
    assert "r_min=0.2" in repr(layer)
    RenormSchedule(10).attach(nn.Sequential(layer))
    assert layer.r_min == 1.0  # plain BN until the limits rise
    for wrong in (0.0, 1.5, float("nan")):
        with pytest.raises(UsageError, match="r_min is"):
            BatchRenorm1d(3, r_min=wrong)


def test_r_and_d_may_refer_to_averages_of_their_own() -> None:
    layer, x = _layer(momentum=0.01, renorm_momentum=0.5), _batch(2.0, 1.0)
    assert set(layer.state_dict()) - set(nn.BatchNorm1d(3).state_dict()) == {"renorm_mean", "renorm_var"}
    zero, one = torch.zeros(3).double(), torch.ones(3).double()
    before = layer.running_mean.clone(), layer.running_var.clone()
    assert_close(layer(x), _by_hand(x, zero, one, (1 / 3, 3.0), 5.0))
    own, spread = x.mean((0, 2)), x.var((0, 2))
    assert_close(layer.renorm_mean, 0.5 * own)
    assert_close(layer.renorm_var, 0.5 + 0.5 * spread)
    assert_close(layer.running_mean, 0.99 * before[0] + 0.01 * own)
    assert_close(layer.running_var, 0.99 * before[1] + 0.01 * spread)
    net = nn.Sequential(layer)
    assert set(deploy.deployable_state(net, nn.Sequential(nn.BatchNorm1d(3, dtype=torch.float64)))) == {
        f"0.{key}" for key in nn.BatchNorm1d(3).state_dict()
    }
    layer.reset_running_stats()
    assert_close((layer.renorm_mean, layer.renorm_var), (zero, one))


def test_deviations_can_be_averaged_as_in_the_paper() -> None:
    layer, x = _layer(momentum=0.1, running="std"), _batch(2.0)
    deviation = (layer.running_var + EPS).sqrt()
    layer(x)
    own = (x.var((0, 2), correction=0) + EPS).sqrt()
    assert_close((layer.running_var + EPS).sqrt(), 0.9 * deviation + 0.1 * own)
    with pytest.raises(UsageError, match='must be "variance" or "std"'):
        BatchRenorm1d(3, running="mean")  # type: ignore[arg-type]


@pytest.mark.parametrize(("n", "expected"), [(2, 0.7071), (32, 0.9843)])
def test_the_docstring_states_the_effect_of_the_unbiased_variance(n: int, expected: float) -> None:
    """A batch that is like the running statistics has r = sqrt(1 - 1/n)."""
    x = torch.randn(n, 1, dtype=torch.float64)
    r = (x.var(0, correction=0) / x.var(0)).sqrt()
    assert_close(r.item(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("rows", "sizes"), [(6, [2, 2, 2]), (5, [2, 2, 1]), (2, [2]), (1, [1])])
def test_ghost_batches_are_normalized_one_after_the_other(rows: int, sizes: list[int]) -> None:
    layer = _layer(virtual_batch_size=2, momentum=0.3)
    twin = _layer(momentum=0.3)
    x = _batch(3.0)[:rows]
    assert_close(layer(x), torch.cat([twin(part) for part in x.split(sizes)]))
    assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))
    assert layer.num_batches_tracked == len(sizes)
    assert_close(layer.eval()(x), twin.eval()(x))
    with pytest.raises(UsageError, match="virtual_batch_size is 0"):
        BatchRenorm1d(3, virtual_batch_size=0)


@pytest.mark.parametrize("kind", [BatchRenorm1d, SyncBatchRenorm, GatedBatchNorm1d, GhostBatchNorm1d, InstanceRenorm1d])
def test_padding_does_not_count(kind: type[nn.Module]) -> None:
    """Statistics are those of the sequences without their padding, whatever lies there."""
    layer = kind(3, dtype=torch.float64, momentum=0.2)
    twin = copy.deepcopy(layer)
    x = _batch(2.0, 1.0)
    padded = torch.cat([x, torch.full_like(x, torch.nan)], dim=2).requires_grad_()
    mask = torch.arange(10) < 5
    output = layer(padded, mask=mask.expand(6, 10))[..., :5]
    assert_close(output, twin(x))
    assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))
    output.square().sum().backward()
    assert torch.isfinite(padded.grad).all()
    for wrong in (torch.ones(6, 4), torch.ones(6, 3, 10), torch.ones(6)):
        with pytest.raises(ValueError, match="expected a mask of shape"):
            layer(padded, mask=wrong)
    for weights in (mask.float(), mask.long()):
        with pytest.raises(ValueError, match="True where there is a value: give mask != 0"):
            layer(padded, mask=weights.expand(6, 10))
    with pytest.raises(ValueError, match=r"a tensor of dtype torch\.bool, but got str"):
        layer(padded, mask="x")


@pytest.mark.parametrize("kind", [BatchRenorm1d, GatedBatchNorm1d, GhostBatchNorm1d, InstanceRenorm1d])
def test_vectors_that_are_padding_do_not_count(kind: type[nn.Module]) -> None:
    layer = kind(3, dtype=torch.float64, momentum=0.2)
    twin, x, mask = copy.deepcopy(layer), torch.randn(6, 3, dtype=torch.float64), torch.arange(6) < 4
    assert_close(layer(torch.where(mask[:, None], x, torch.nan), mask=mask)[:4], twin(x[:4]))
    assert_close(dict(layer.named_buffers()), dict(twin.named_buffers()))


def test_sequences_of_different_lengths_count_by_their_lengths() -> None:
    layer, x = _layer(momentum=1.0), _batch()
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 2, 1, 0])[:, None]
    layer(x, mask=mask)
    kept = x.transpose(1, 2)[mask]
    assert_close(layer.running_mean, kept.mean(0))
    assert_close(layer.running_var, kept.var(0))


@pytest.mark.parametrize("count", [0, 1])
def test_a_mask_that_leaves_too_little_moves_no_variance(count: int) -> None:
    layer, x = _layer(momentum=0.5), _batch()
    before = layer.running_mean.clone(), layer.running_var.clone()
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask.view(-1)[:count] = True
    assert torch.isfinite(layer(x, mask=mask)).all()
    assert_close(layer.running_var, before[1])
    expected = before[0] if count == 0 else 0.5 * (before[0] + x[0, :, 0])
    assert_close(layer.running_mean, expected)


@pytest.mark.parametrize(
    ("lazy", "shape"),
    [(LazyBatchRenorm1d, (4, 5)), (LazyBatchRenorm2d, (4, 5, 3, 3)), (LazyBatchRenorm3d, (4, 5, 2, 2, 2))],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_lazy_layer_becomes_the_layer(lazy: Any, shape: tuple[int, ...], bias: bool) -> None:
    layer = lazy(r_max=2.0, momentum=0.1, bias=bias, renorm_momentum=0.2)
    x = torch.randn(shape)
    output = layer(x)
    assert type(layer) is lazy.cls_to_become
    twin = lazy.cls_to_become(5, r_max=2.0, momentum=0.1, bias=bias, renorm_momentum=0.2)
    assert_close(output, twin(x))
    assert_close(dict(layer.state_dict()), dict(twin.state_dict()))
    assert repr(layer) == repr(twin)


def test_a_checkpoint_resumes_the_schedule() -> None:
    net = nn.Sequential(BatchRenorm1d(3), BatchRenorm1d(3))
    schedule = RenormSchedule(steps=100)
    schedule.attach(net)
    for _ in range(60):
        schedule.advance()
    state = net.state_dict()
    for attach_first in (True, False):
        resumed, again = RenormSchedule(steps=100), nn.Sequential(BatchRenorm1d(3), BatchRenorm1d(3))
        for action in [resumed.attach, lambda net: net.load_state_dict(state)][:: 1 if attach_first else -1]:
            action(again)
        assert (resumed.step, again[1].r_max, again[1].d_max) == (60, net[1].r_max, net[1].d_max)
        assert_close(dict(again.state_dict()), dict(state))
    loaded = nn.Sequential(BatchRenorm1d(3), BatchRenorm1d(3))
    loaded.load_state_dict(state)
    assert_close(dict(loaded.state_dict()), dict(state))  # passed on
    other = nn.Sequential(BatchRenorm1d(3), BatchRenorm1d(3))
    RenormSchedule(steps=50).attach(other)
    with pytest.raises(RuntimeError, match="The saved Batch Renorm schedule has steps = 100"):
        other.load_state_dict(state)
    plain = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    plain.load_state_dict(deploy.deployable_state(net, plain))
    assert pickle.loads(pickle.dumps(net))[0].schedule.step == 60


def test_a_schedule_that_is_never_advanced_warns_once() -> None:
    net = nn.Sequential(BatchRenorm1d(2), BatchRenorm1d(2))
    RenormSchedule(steps=1000).attach(net)
    x = torch.randn(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(199):
            net(x)
        net.eval()(x)
    with pytest.warns(UserWarning, match=r"call RenormSchedule.advance\(\) after every optimizer step"):
        net.train()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x)


def test_the_function_takes_the_same_options() -> None:
    x, mean, variance = _batch(), torch.zeros(3).double(), torch.ones(3).double()
    batch_renorm(x, mean, variance, training=True, track=False, r_min=0.9)
    assert_close((mean, variance), (torch.zeros(3).double(), torch.ones(3).double()))
    layer = BatchRenorm2d(3, virtual_batch_size=4)
    assert "virtual_batch_size=4" in repr(layer)


def test_a_lazy_layer_loads_the_statistics_of_r_and_d() -> None:
    known, plain, x = BatchRenorm2d(4, renorm_momentum=0.1), nn.BatchNorm2d(4), torch.randn(3, 4, 5, 5)
    known(x)
    plain(x)
    lazy, partly = LazyBatchRenorm2d(renorm_momentum=0.1), LazyBatchRenorm2d(renorm_momentum=0.1)
    lazy.load_state_dict(known.state_dict())
    partly.load_state_dict(plain.state_dict(), strict=False)
    for layer, expected in ((lazy, known), (partly, None)):
        found = layer(x)
        assert layer.renorm_mean.shape == (4,)
        if expected is not None:
            assert_close(found, expected(x))
            assert_close(dict(layer.named_buffers()), dict(expected.named_buffers()))
    assert_close(partly.renorm_mean, 0.1 * x.mean((0, 2, 3)))  # from new ones
    assert_close(partly.running_mean, (1 - 0.01) * plain.running_mean + 0.01 * x.mean((0, 2, 3)))


def test_a_schedule_does_not_recompile_a_layer_with_a_lower_limit() -> None:
    torch.compiler.reset()
    layer = BatchRenorm2d(4, r_min=0.7, renorm_momentum=0.1)
    twin = copy.deepcopy(layer)
    schedules = [RenormSchedule(20, r_max=2.0, warmup=0.0, r_ramp=0.5, d_ramp=0.5) for _ in range(2)]
    graphs = CompileCounter()
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    for schedule, each in zip(schedules, (layer, twin), strict=True):
        schedule.attach(nn.Sequential(each))
    for _ in range(12):
        x = 0.3 * torch.randn(3, 4, 5, 5)
        assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-5)
        for schedule in schedules:
            schedule.advance()
    assert graphs.frame_count == 1

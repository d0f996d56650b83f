"""Subclasses that do more than normalize: carried over whole, or refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import bnprobe
from bnprobe.errors import RepairError
from bnprobe.nn.batch_renorm import SyncBatchRenorm
from support.networks import unsettled
from unit.repairs.models import (
    EVERY,
    Activated,
    BatchNormAct,
    BatchNormRelu,
    Choosy,
    NeverTraining,
    OtherwiseInTraining,
    Pooling,
    Renamed,
    Swapped,
    SyncBatchNormAct,
    images,
    prepared,
)


@pytest.fixture(autouse=True)
def _in_a_domain() -> Iterator[None]:
    """Layers with statistics per domain need to know theirs; others do not notice."""
    with bnprobe.nn.domain(0):
        yield


@pytest.mark.parametrize("to", EVERY)
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_an_activation_of_a_subclass_is_carried_over(to: str, drop: float) -> None:
    model = prepared(Activated(drop)).train()
    converted = bnprobe.convert(model, to=to)
    assert not isinstance(converted.bn, BatchNormAct)
    assert {"bn.act.weight"} <= set(converted.state_dict())
    bare = copy.deepcopy(converted.bn)
    bare._forward_hooks.clear()
    x = images(4, 4, 6, 6)
    torch.manual_seed(1)
    normalized = bare(x)
    expected = bare.act(bare.drop(normalized))
    torch.manual_seed(1)
    torch.testing.assert_close(converted.bn(x), expected)
    assert not torch.allclose(normalized, expected)


def test_a_carried_activation_is_copied_pickled_and_converted_once_more() -> None:
    model = prepared(Activated()).eval()
    once = bnprobe.convert(model, to="frozen")
    twice = bnprobe.convert(once, to="gated")
    for twin in (once, twice, copy.deepcopy(twice), pickle.loads(pickle.dumps(once))):
        torch.testing.assert_close(twin(images()), model(images()), rtol=0, atol=1e-6)
    assert list(twice.bn._forward_hooks.values()) == list(once.bn._forward_hooks.values())


def test_a_subclass_by_name_alone_is_converted_and_keeps_its_children_unused() -> None:
    bn = unsettled(Renamed(4)).eval()
    layer = bnprobe.convert(bn)
    assert isinstance(layer.unused, nn.ReLU)
    assert torch.equal(layer(images(2, 4, 3, 3)), bn(images(2, 4, 3, 3)))
    assert (layer(images(2, 4, 3, 3)) < 0).any()


@pytest.mark.parametrize("to", EVERY)
@pytest.mark.parametrize("kind", [BatchNormRelu, Swapped, OtherwiseInTraining, NeverTraining, Pooling])
def test_a_subclass_that_cannot_be_taken_apart_is_refused(to: str, kind: type[nn.BatchNorm2d]) -> None:
    model = prepared(nn.Sequential(nn.Conv2d(3, 4, 1), kind(4)))
    with pytest.raises(RepairError, match=rf"1 \({kind.__name__}\) does more than normalize"):
        bnprobe.convert(model, to=to)
    assert type(model[1]) is kind


def test_a_subclass_that_cannot_be_tried_is_refused_with_its_own_words() -> None:
    with pytest.raises(RepairError, match=r"failed on a random input \(ValueError: not an image of 224\)"):
        bnprobe.convert(nn.Sequential(Choosy(4)))


def test_a_subclass_without_running_statistics_is_carried_over_to_group_norm() -> None:
    layer = bnprobe.convert(prepared(BatchNormAct(4, track_running_stats=False)), to="group-norm")
    x = images(2, 4, 3, 3)
    expected = nn.functional.prelu(nn.functional.group_norm(x, 2, layer.weight, layer.bias), layer.act.weight)
    torch.testing.assert_close(layer(x), expected)


def test_a_synchronized_subclass_keeps_its_activation() -> None:
    layer = prepared(SyncBatchNormAct(4)).eval()
    converted = bnprobe.convert(layer)
    assert isinstance(converted, SyncBatchRenorm)
    x = images(2, 4, 3, 3)
    assert torch.equal(converted(x), layer(x))
    assert (converted(x) >= 0).all()


def test_trying_a_subclass_draws_nothing_and_changes_nothing() -> None:
    model = prepared(Activated(0.5)).train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bnprobe.convert(model)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Uncounted(nn.BatchNorm2d):
    """Normalizes and averages as BN does, and counts nothing, as synchronized norms of the user's own do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


@pytest.mark.parametrize("to", EVERY)
@pytest.mark.parametrize("without", [False, True])
def test_updates_that_are_not_counted_are_nothing_that_a_layer_computes(to: str, without: bool) -> None:
    model = unsettled(nn.Sequential(nn.Conv2d(3, 4, 3), Uncounted(4)))
    if without:
        model[1].num_batches_tracked = None
    converted = bnprobe.convert(model, to=to)
    assert not isinstance(converted[1], Uncounted)
    if to in ("frozen", "batch-renorm", "sync"):
        torch.testing.assert_close(converted.eval()(images()), model.eval()(images()))
        assert bnprobe.deployable_state(converted, model).keys() == model.state_dict().keys()

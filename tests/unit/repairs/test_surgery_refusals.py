"""What is refused by name, because something would be lost without a word."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, weight_norm

import bnprobe
from bnprobe.errors import RepairError
from bnprobe.nn.batch_renorm import BatchRenorm2d
from support.networks import Residual
from unit.repairs.models import EVERY, images, prepared


def _lazy() -> nn.Module:
    return nn.LazyBatchNorm2d()


def _parametrized() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    parametrize.register_parametrization(layer, "weight", nn.Softplus(), unsafe=True)
    return layer


def _weight_normed() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    layer.weight = nn.Parameter(torch.ones(4, 1))
    with pytest.warns(FutureWarning):
        return weight_norm(layer)


def _patched() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    return layer


def _with_buffer() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.register_buffer("calibration", torch.zeros(4))
    return layer


def _without_parameter() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    del layer.weight
    layer.weight = torch.ones(4)
    return layer


def _with_state_hook() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.register_load_state_dict_pre_hook(lambda *args: None)
    return layer


REFUSED = [
    (_lazy, "is lazy"),
    (_parametrized, "is parametrized"),
    (_weight_normed, "has parameters or buffers that BN does not have"),
    (_patched, "has its method forward replaced"),
    (_with_buffer, r"has parameters or buffers that BN does not have \(calibration\)"),
    (_without_parameter, "has no parameter weight"),
    (_with_state_hook, "has state_dict hooks"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
@pytest.mark.parametrize("to", EVERY)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_what_would_be_lost_is_refused_by_name(make: Callable[[], nn.Module], reason: str, to: str) -> None:
    model = nn.ModuleDict({"odd": make(), "fine": nn.BatchNorm2d(4)})
    odd = model["odd"]
    with pytest.raises(RepairError, match=rf"odd \(\w+\) {reason}"):
        bnprobe.convert(model, to=to, inplace=True)
    assert model["odd"] is odd
    assert type(model["fine"]) is nn.BatchNorm2d


@pytest.mark.parametrize("to", EVERY)
def test_without_running_statistics_only_layers_that_keep_none_are_possible(to: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False, affine=False))
    if not isinstance(bnprobe.convert(nn.BatchNorm2d(4), to=to), _BatchNorm):
        assert not list(bnprobe.convert(model, to=to)[0].buffers())
    else:
        with pytest.raises(RepairError, match=r"0 \(BatchNorm2d\) keeps no running statistics"):
            bnprobe.convert(model, to=to)


class FullyShardedDataParallel(nn.Sequential):
    """Stands in for torch's, which needs a process group."""


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def _scripted(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, images())


@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (nn.DataParallel, "attribute module"),
        (_compiled, "attribute _orig_mod"),
        (_scripted, "before torch.jit.script"),
        (FullyShardedDataParallel, "before wrapping"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_wrapped_models_are_refused_with_advice(wrap: Callable[[nn.Module], nn.Module], advice: str) -> None:
    wrapped = wrap(prepared(Residual()).eval())
    with pytest.raises(RepairError, match=rf"The model is wrapped in \w+.*{advice}"):
        bnprobe.convert(wrapped)
    with pytest.raises(RepairError, match=r"1 is wrapped in"):
        bnprobe.convert(nn.Sequential(nn.BatchNorm2d(3), wrapped))
    harmless = bnprobe.convert(nn.Sequential(nn.BatchNorm2d(3), wrap(nn.Conv2d(3, 3, 1))))
    assert isinstance(harmless[0], BatchRenorm2d)


def test_a_model_that_cannot_be_copied_is_refused_unless_in_place() -> None:
    model = Residual()
    model.cache = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(RepairError, match=r"Residual cannot be copied: cache, a Tensor .*inplace=True"):
        bnprobe.convert(model)
    bnprobe.convert(model, inplace=True)
    assert isinstance(model.bn1, BatchRenorm2d)


@pytest.mark.parametrize(
    ("to", "what"), [("ghost", "ghost batches"), ("mabn", "averages"), ("per-domain", "statistics per domain")]
)
def test_what_one_process_keeps_is_refused_for_synchronized_layers(to: str, what: str) -> None:
    with pytest.raises(RepairError, match=rf"0 \(SyncBatchNorm\) is synchronized between processes, and {what}"):
        bnprobe.convert(nn.Sequential(nn.SyncBatchNorm(4)), to=to)


@pytest.mark.parametrize("to", ["batch-renorm", "frozen", "sync", "instance-renorm", "gated", "ghost", "mabn"])
def test_statistics_that_are_kept_and_not_tracked_stay_so(to: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    model[0].track_running_stats = False
    converted = bnprobe.convert(model, ["0"], to=to)
    before = converted[0].running_mean.clone()
    converted.train()(torch.randn(4, 3, 5, 5))
    assert torch.equal(converted[0].running_mean, before)

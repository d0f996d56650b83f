"""The target whose layers follow the convolution before them: how that is found, tied, and given up."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import bnprobe
from bnprobe.errors import DeviceError, RepairError
from bnprobe.nn.cross_iteration import CrossIterationBatchNorm1d, CrossIterationBatchNorm2d
from bnprobe.repairs import deployable_state, plan
from support.fingerprint import fingerprint
from support.networks import Residual
from unit.repairs.models import BatchNormAct, images, prepared

TO = "cross-iteration"


class Called(nn.Module):
    """Two convolutions and a norm, called as a function says."""

    def __init__(
        self, how: Callable[[Called, Tensor], Tensor], second: nn.Module | None = None, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = second or nn.Conv2d(4, 4, 1)
        self.bn = norm or nn.BatchNorm2d(4)
        self.other = nn.BatchNorm2d(4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


def _straight(net: Called, x: Tensor) -> Tensor:
    return net.bn(net.second(net.first(x)))


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: Called(lambda net, x: net.bn(net.second(net.first(x)).relu())), "normalizes what relu computes, and not"),
    (lambda: Called(lambda net, x: net.bn(net.first(x) + 1)), "normalizes what add computes, and not"),
    (lambda: Called(lambda net, x: net.bn(net.first(x)[:1])), "normalizes what getitem computes, and not"),
    (lambda: Called(lambda net, x: net.bn(x)), "normalizes an input of the model, and not"),
    (lambda: Called(lambda net, x: net.other(net.first(x))), "is not called where torch.fx follows"),
    (lambda: Called(lambda net, x: net.bn(net.second(net.bn(net.first(x))))), "is called several times in a forward"),
    (
        lambda: Called(lambda net, x: net.bn(net.second(net.second(net.first(x))))),
        r"normalizes the output of second \(Conv2d\), which is called several times in a forward",
    ),
    (
        lambda: Called(lambda net, x: net.bn(y := net.first(x)) + net.other(y)),
        r"normalizes the output of first \(Conv2d\), as another layer does",
    ),
    (
        lambda: Called(_straight, nn.ConvTranspose2d(4, 4, 1)),
        r"normalizes the output of second \(ConvTranspose2d\), which is transposed",
    ),
    (lambda: Called(_straight, weight_norm(nn.Conv2d(4, 4, 1))), "which has no weight of its own, but computes it"),
    (lambda: Called(_straight, Standardized(4, 4, 1)), "which has a forward of its own"),
    (lambda: Called(_straight, nn.AvgPool2d(2)), "which is neither a convolution nor a linear module"),
    (
        lambda: Called(lambda net, x: _straight(net, x) if x.sum() > 0 else x),
        r"stands in a model whose forward torch\.fx cannot follow.*TraceError",
    ),
    (lambda: Called(_straight, norm=nn.SyncBatchNorm(4)), "is synchronized between processes, and the batches of a"),
    (lambda: Called(_straight, norm=nn.BatchNorm2d(4, eps=0.0)), "has eps 0, and cross-iteration batch norm needs"),
    (lambda: Called(_straight, norm=nn.BatchNorm2d(4, track_running_stats=False)), "keeps no running statistics"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_layers_without_a_single_convolution_before_are_refused_by_name(
    make: Callable[[], nn.Module], reason: str
) -> None:
    model = make()
    before = fingerprint(model)
    with pytest.raises(RepairError, match=rf"bn \(\w+\) .*{reason}"):
        bnprobe.convert(model, ["bn"], to=TO, inplace=True)
    assert fingerprint(model) == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("inplace", [True, False])
def test_a_window_that_does_not_fit_into_memory_is_refused_and_changes_nothing(inplace: bool) -> None:
    """Whichever layer it is that does not fit: the first one has a small window."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.Conv2d(1, 1, 2048), nn.BatchNorm2d(1))
    before = fingerprint(model)
    with pytest.raises(DeviceError, match=r"not enough memory for the layers of cross-iteration: .*allocate"):
        bnprobe.convert(model, to=TO, window=10**6, inplace=inplace)
    assert fingerprint(model) == before
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_alone_is_refused() -> None:
    with pytest.raises(RepairError, match=r"\(root\) \(BatchNorm2d\) stands alone"):
        bnprobe.convert(nn.BatchNorm2d(4), to=TO)


def test_a_layer_in_a_plain_list_is_refused() -> None:
    model = Called(lambda net, x: net.norms[0](net.first(x)))
    model.norms = [nn.BatchNorm2d(4)]
    with pytest.raises(RepairError, match=r"norms\S* \(BatchNorm2d\): stands in a model whose.*NameError"):
        bnprobe.convert(model, to=TO)


def test_tracing_a_forward_that_keeps_things_changes_nothing() -> None:
    def how(net: Called, x: Tensor) -> Tensor:
        net.last = x
        net.calls.add_(1)
        return _straight(net, x)

    model = Called(how)
    model.register_buffer("calls", torch.zeros(()))
    before = fingerprint(model)
    made = plan(model, {"bn": "all"}, TO, "test")
    assert [(change.name, change.to) for change in made.changes] == [("bn", "CrossIterationBatchNorm2d")]
    assert fingerprint(model) == before
    assert model.calls == 0


@pytest.mark.parametrize("inplace", [True, False])
def test_layers_follow_the_convolutions_of_their_own_model(inplace: bool) -> None:
    model = prepared(Residual())
    conv, parameters = model.conv, dict(model.named_parameters())
    converted = bnprobe.convert(model, to=TO, window=4, burn_in=2, inplace=inplace)
    assert (converted is model) == inplace
    assert (converted.conv is conv) == inplace
    for layer, before in ((converted.bn1, converted.stem), (converted.bn2, converted.conv)):
        assert type(layer) is CrossIterationBatchNorm2d
        assert layer._followed == (before,)
        assert (layer.window, layer.burn_in) == (4, 2)
        assert len(before._forward_hooks) == 1
    assert list(dict(converted.named_parameters())) == list(parameters)
    if inplace:
        assert all(value is parameters[name] for name, value in converted.named_parameters())
    else:
        assert not conv._forward_hooks
        assert type(model.bn1) is nn.BatchNorm2d


def test_trained_weights_load_strictly_and_infer_the_same() -> None:
    original = prepared(Residual()).eval()
    converted = bnprobe.convert(original, to=TO, window=3).train()
    x = images(4, 3, 6, 6)
    torch.testing.assert_close(copy.deepcopy(converted).eval()(x), original(x), rtol=0, atol=1e-6)
    optimizer = torch.optim.SGD(converted.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        converted(x).square().mean().backward()
        optimizer.step()
    assert converted.bn2.batches_seen == 4
    state = deployable_state(converted.eval(), original)
    assert list(state) == list(original.state_dict())
    untrained = original(x)
    original.load_state_dict(state, strict=True)
    torch.testing.assert_close(original(x), converted(x), rtol=0, atol=1e-6)
    assert not torch.allclose(original(x), untrained, atol=1e-3)


def test_what_a_layer_did_besides_is_kept() -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return prepared(nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct(4)))

    model, called = make(), []
    model[1].register_forward_hook(lambda *args: called.append("forward"))
    model[1].register_full_backward_hook(lambda *args: called.append("backward"))
    model[0].register_full_backward_hook(lambda *args: called.append("convolution"))
    converted = bnprobe.convert(model, to=TO, window=1, inplace=True)
    out, expected = converted(images(4, 3, 6, 6).requires_grad_()), make()(images(4, 3, 6, 6))
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert called == ["forward", "backward", "convolution"]


def test_converted_again_a_layer_gives_its_convolution_up() -> None:
    model = prepared(Residual())
    converted = bnprobe.convert(model, to=TO, window=4)
    converted(images())
    shorter = bnprobe.convert(converted, to=TO, window=2)
    assert [len(each._forward_hooks) for each in (shorter.stem, shorter.conv)] == [1, 1]
    assert shorter.bn1.batches_seen == 0
    shorter(images())
    back = bnprobe.convert(converted, to="frozen")
    assert not any(module._forward_hooks for module in back.modules())
    assert "_handed_over" not in vars(back.conv)
    assert set(back.state_dict()) == set(model.state_dict())
    converted(images())  # which still follows its own
    mixed = bnprobe.convert(converted, ["bn1"], to="gated")
    assert [len(each._forward_hooks) for each in (mixed.stem, mixed.conv)] == [0, 1]


def test_linear_modules_are_followed() -> None:
    model = bnprobe.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), to=TO)
    assert type(model[1]) is CrossIterationBatchNorm1d
    assert model(torch.randn(5, 3)).shape == (5, 4)


def test_a_reason_that_all_layers_share_is_said_once() -> None:
    net = Called(lambda net, x: net.other(_straight(net, x)) if x.sum() > 0 else x)
    with pytest.raises(RepairError) as refused:
        bnprobe.convert(net, to=TO)
    assert "bn, other (BatchNorm2d): stands in a model whose forward" in str(refused.value)
    assert str(refused.value).count("torch.fx cannot follow") == 1

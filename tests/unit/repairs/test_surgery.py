"""What surgery must not lose."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnprobe
from bnprobe.config.targets import TARGETS
from bnprobe.nn.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenormBase, SyncBatchRenorm
from support.networks import Residual, unsettled
from unit.repairs.models import DEPLOYING, EVERY, Activated, BatchNormAct, Branches, images, prepared


@pytest.fixture(autouse=True)
def _in_a_domain() -> Iterator[None]:
    """Layers with statistics per domain need to know theirs; others do not notice."""
    with bnprobe.nn.domain(0):
        yield


@pytest.mark.parametrize("to", EVERY)
def test_a_shared_layer_stays_one_layer_in_all_its_places(to: str) -> None:
    model = bnprobe.convert(prepared(Branches()), to=to)
    new = model.bn
    assert not type(new).__module__.startswith("torch.nn.modules.batchnorm")
    places = [model.again, model.path[1], model.listed[1], model.in_list[0], model.unregistered]
    assert all(place is new for place in places)
    assert model.method.__self__ is new
    assert model.in_list[2]["deep"][0] is model.listed[0]
    assert type(model.listed[0]) is type(model.keyed["first"]) is type(new)
    assert model.listed[0] is not new


@pytest.mark.parametrize("to", DEPLOYING)
def test_inference_is_what_it_was(to: str) -> None:
    for model in (prepared(Branches()).eval(), prepared(Residual()).eval(), prepared(Activated(0.3)).eval()):
        converted = bnprobe.convert(model, to=to)
        torch.testing.assert_close(converted(images()), model(images()), rtol=0, atol=1e-6)


def test_the_original_is_not_changed_by_a_copy() -> None:
    model = prepared(Branches())
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    bnprobe.convert(model)(images())
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("to", EVERY)
def test_parameters_stay_the_same_objects_in_place(to: str) -> None:
    model = prepared(Residual())
    model.bn2.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert bnprobe.convert(model, to=to, inplace=True) is model
    found = {name: id(parameter) for name, parameter in model.named_parameters() if "gate_logit" not in name}
    assert found == parameters
    assert not model.bn2.bias.requires_grad
    before = model.bn1.weight.detach().clone()
    model(images()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.bn1.weight, before)


@pytest.mark.parametrize("to", EVERY)
def test_dtype_and_mode_are_kept(to: str) -> None:
    model = prepared(Residual()).double().train()
    model.bn1.eval()
    converted = bnprobe.convert(model, to=to)
    assert not converted.bn1.training
    assert converted.bn2.training
    tensors = [*converted.parameters(), *converted.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float64}
    assert converted(images().double()).dtype == torch.float64


@pytest.mark.parametrize("to", EVERY)
def test_the_device_is_kept(to: str) -> None:
    model = bnprobe.convert(nn.Sequential(nn.BatchNorm2d(4, device="meta")), to=to)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


@pytest.mark.parametrize("to", EVERY)
@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"eps": 0.1}])
def test_settings_are_kept(to: str, options: dict[str, Any]) -> None:
    bn = unsettled(nn.BatchNorm2d(4, **options)).eval()
    own_momentum: dict[str, Any] = {"renorm": {"momentum": None}} if "renorm" in TARGETS[to].settings else {}
    layer = bnprobe.convert(bn, to=to, **own_momentum)
    assert layer.eps == bn.eps
    assert (layer.weight is None) == (bn.weight is None)
    beyond = set(getattr(layer, "training_only", ()))
    assert set(layer.state_dict()) - beyond <= set(bn.state_dict())
    if isinstance(layer, _BatchNorm):
        assert layer.momentum == bn.momentum
    if to in DEPLOYING:
        torch.testing.assert_close(layer(images(2, 4, 3, 3)), bn(images(2, 4, 3, 3)), rtol=0, atol=1e-6)
    layer.train()(images(2, 4, 3, 3))


@pytest.mark.parametrize("to", EVERY)
def test_a_weight_without_a_bias_is_kept(to: str) -> None:
    bn = unsettled(nn.BatchNorm2d(4))
    bn.bias = None
    layer = bnprobe.convert(bn, to=to)
    assert layer.bias is None
    layer.train()(images(2, 4, 3, 3)).square().sum().backward()
    assert layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("to", EVERY)
def test_the_root_itself_may_be_the_layer(to: str) -> None:
    bn = nn.BatchNorm2d(4)
    layer = bnprobe.convert(bn, to=to, inplace=True)
    assert layer is not bn
    assert layer.weight is bn.weight
    assert layer(images(5, 4, 3, 3)).shape == (5, 4, 3, 3)


@pytest.mark.parametrize("to", EVERY)
def test_hooks_go_on_being_called(to: str) -> None:
    model = prepared(Activated())
    called: list[str] = []
    outputs: list[Tensor] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: called.append(name)

    layer = model.bn
    handles = [
        layer.register_forward_pre_hook(note("pre")),
        layer.register_forward_pre_hook(lambda module, args, kwargs: called.append("pre kwargs"), with_kwargs=True),
        layer.register_forward_hook(note("post"), always_call=True),
        layer.register_forward_hook(lambda module, args, kwargs, out: outputs.append(out), with_kwargs=True),
        layer.register_full_backward_hook(note("backward")),
        layer.register_full_backward_pre_hook(note("backward pre")),
    ]
    bnprobe.convert(model, ["bn"], to=to, inplace=True)
    received: list[Any] = []
    model.last.register_forward_pre_hook(lambda module, args: received.append(args))
    model(images()).square().sum().backward()
    assert called == ["pre", "pre kwargs", "post", "backward pre", "backward"]
    assert torch.equal(outputs[0], received[0][0])  # what comes after the activation
    called.clear()
    with pytest.raises((ValueError, RuntimeError)):
        model.bn(torch.randn(2))
    assert "post" in called  # always_call
    called.clear()
    for handle in handles:
        handle.remove()
    outputs.clear()
    model(images()).square().sum().backward()
    assert called == []
    assert outputs == []


def test_hooks_bound_to_the_model_are_copied_with_it() -> None:
    class Watching(Residual):
        def watch(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.seen = output

    model = Watching()
    model.bn1.register_forward_hook(model.watch)
    converted = bnprobe.convert(model)
    converted(images())
    assert isinstance(converted.seen, Tensor)
    assert not hasattr(model, "seen")


@pytest.mark.parametrize("to", [to for to in EVERY if to not in ("ghost", "mabn", "per-domain")])
def test_sync_batch_norm_is_converted(to: str) -> None:
    group = object()
    sync = unsettled(nn.SyncBatchNorm(4, process_group=group)).eval()
    layer = bnprobe.convert(nn.Sequential(sync), to=to, inplace=True)[0]
    assert layer.weight is sync.weight
    if to in ("sync", "batch-renorm"):
        assert isinstance(layer, SyncBatchRenorm)
        assert layer.process_group is group
    if to in DEPLOYING:
        for shape in ((5, 4), (2, 4, 3, 3), (2, 4, 3, 3, 3)):
            torch.testing.assert_close(layer(images(*shape)), sync(images(*shape)), rtol=0, atol=1e-6)


def test_the_variant_follows_the_layer_s_own_check_of_dimensions() -> None:
    class Own(_BatchNorm):
        def _check_input_dim(self, input: Tensor) -> None:
            if input.dim() not in (2, 3):
                raise ValueError("no")

    assert type(bnprobe.convert(Own(3))) is BatchRenorm1d
    assert type(bnprobe.convert(nn.BatchNorm2d(3))) is BatchRenorm2d
    assert type(bnprobe.convert(bnprobe.convert(nn.BatchNorm2d(3), to="frozen"))) is BatchRenorm2d


def test_attributes_that_the_user_hung_on_a_layer_stay() -> None:
    bn = nn.BatchNorm2d(3)
    bn.tag = {"stage": 2}
    layer = bnprobe.convert(bn, to="group-norm", inplace=True)
    assert layer.tag is bn.tag
    assert not hasattr(layer, "track_running_stats")


def test_weights_shared_between_two_layers_stay_shared() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[1].weight = model[0].weight
    converted = bnprobe.convert(model)
    assert converted[0].weight is converted[1].weight
    assert converted[0] is not converted[1]


def test_a_norm_within_a_norm_is_found() -> None:
    outer = BatchNormAct(4)
    outer.drop = nn.BatchNorm2d(4)
    model = prepared(nn.Sequential(outer)).eval()
    expected = model(images(2, 4, 3, 3))
    converted = bnprobe.convert(model)
    assert isinstance(converted[0].drop, BatchRenormBase)
    torch.testing.assert_close(converted(images(2, 4, 3, 3)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("to", EVERY)
def test_called_twice_per_forward(to: str) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.bn(x).relu())

    model = bnprobe.convert(prepared(Twice()), to=to).train()
    x = images(2, 4, 3, 3).requires_grad_()
    model(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()

"""A norm family that another package adds: a layer that is not torch's BN, with a functional form of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

import bnprobe
from bnprobe.measure.norms import NORMS, NormCall, NormFamily, NormInfo, family_of

SIZE, BATCHES = 2, 16


def standardize(
    x: Tensor, mean: Tensor, std: Tensor, gain: Tensor, offset: Tensor, *, training: bool, eps: float = 1e-3
) -> Tensor:
    """Batch norm that keeps a running standard deviation instead of a variance."""
    if has_torch_function_unary(x):
        given: dict[str, Any] = {"training": training, "eps": eps}
        output: Tensor = handle_torch_function(standardize, (x,), x, mean, std, gain, offset, **given)
        return output
    if training:
        variance, batch_mean = torch.var_mean(x, (0, 2, 3), correction=0)
        with torch.no_grad():
            mean.lerp_(batch_mean, 0.1)
            std.lerp_(variance.sqrt(), 0.1)
    else:
        batch_mean, variance = mean, std.square()
    shape = (1, -1, 1, 1)
    z = (x - batch_mean.view(shape)) / (variance + eps).sqrt().view(shape)
    return gain.view(shape) * z + offset.view(shape)


class Standardize(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("moving_mean", torch.zeros(channels))
        self.register_buffer("moving_std", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return standardize(x, self.moving_mean, self.moving_std, self.gain, self.offset, training=self.training)


class StandardizeFamily:
    name = "standardize"
    functionals = (standardize,)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, Standardize)

    def obstacle(self, module: nn.Module) -> str | None:
        return None

    def describe(self, module: nn.Module) -> NormInfo:
        assert isinstance(module, Standardize)
        return NormInfo(
            channels=len(module.gain),
            eps=1e-3,
            momentum=0.1,
            batches_tracked=None,
            running_mean=module.moving_mean,
            running_variance=module.moving_std.square(),
        )

    def parse(
        self,
        x: Tensor,
        mean: Tensor,
        std: Tensor,
        gain: Tensor,
        offset: Tensor,
        *,
        training: bool,
        eps: float,
    ) -> NormCall:
        return NormCall(x, mean, std.square(), gain, offset, training, eps)

    def evaluate(self, call: NormCall) -> Tensor:
        assert call.running_mean is not None
        assert call.running_variance is not None
        assert call.weight is not None
        assert call.bias is not None
        std = call.running_variance.sqrt()
        return standardize(call.input, call.running_mean, std, call.weight, call.bias, training=False, eps=call.eps)

    def note(self, info: NormInfo) -> str | None:
        return "keeps a standard deviation"


@pytest.fixture
def family() -> Iterator[NormFamily]:
    with NORMS.including(StandardizeFamily()) as row:
        yield row


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), Standardize(8), nn.ReLU(), nn.Conv2d(8, 8, 3), Standardize(8), nn.Flatten()
    )
    for layer in (model[1], model[4]):
        nn.init.uniform_(layer.gain, 0.5, 2)
        nn.init.normal_(layer.offset)
    with torch.no_grad():
        for batch in (torch.randn(8, 1, 8, 8) for _ in range(30)):
            model.train()(batch)
    return model


def batches() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(1.3 * torch.randn(SIZE, 1, 8, 8, generator=generator),) for _ in range(BATCHES)]


def real_mismatches(model: nn.Module, path: str) -> dict[str, float]:
    """Mean squared difference of a layer's training and inference outputs before gain and offset, by a float64 loop."""
    model = copy.deepcopy(model).double().train(path == "train")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Standardize)}
    inputs: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda module, given, name=name: inputs.update({name: given[0]}))
    found: dict[str, list[float]] = {name: [] for name in layers}
    state = copy.deepcopy(model.state_dict())
    for (images,) in batches():
        with torch.no_grad():
            model(images.double())
        model.load_state_dict(state)
        for name, layer in layers.items():
            x = inputs[name]
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            z_train, z_test = (
                (x - m.view(1, -1, 1, 1)) / (v + 1e-3).sqrt().view(1, -1, 1, 1)
                for m, v in ((mean, variance), (layer.moving_mean, layer.moving_std.square()))
            )
            found[name].append(float((z_train - z_test).square().mean()))
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_a_scan_measures_its_layers_exactly(family: NormFamily) -> None:
    model = network()
    assert family_of(model[1]) is family
    before = copy.deepcopy(model.state_dict())
    report = bnprobe.scan(model, batches(), SIZE, num_batches=BATCHES)
    assert report.scan.emulated
    assert [(layer.name, layer.kind) for layer in report.layers] == [("1", "Standardize"), ("4", "Standardize")]
    for path in ("train", "eval"):
        measured = {layer.name: getattr(layer, path).mismatch for layer in report.layers}
        assert measured == pytest.approx(real_mismatches(model, path), rel=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_its_note_stands_in_the_report(family: NormFamily) -> None:
    report = bnprobe.scan(network(), batches(), SIZE, num_batches=BATCHES)
    assert [layer.note for layer in report.layers] == ["keeps a standard deviation"] * 2


def test_the_output_is_that_of_real_micro_batches(family: NormFamily) -> None:
    model = network()
    report = bnprobe.scan(model, batches(), SIZE, num_batches=BATCHES)
    square = norm = 0.0
    for (images,) in batches():
        trained = copy.deepcopy(model)
        with torch.no_grad():
            in_training, at_inference = trained.train()(images), model.eval()(images)
        square += float((in_training - at_inference).square().sum())
        norm += float(at_inference.square().sum())
    assert report.summary.output.relative_l2 == pytest.approx((square / norm) ** 0.5, rel=1e-3)


def test_a_layer_that_does_not_call_it_is_named(family: NormFamily) -> None:
    class Silent(Standardize):
        def forward(self, x: Tensor) -> Tensor:
            return x

    (skipped,) = bnprobe.scan(nn.Sequential(Standardize(1), Silent(1)), batches(), SIZE, num_batches=2).skipped
    assert skipped.reason.startswith("its forward does not call ")
    assert skipped.reason.endswith("test_norms_from_outside.standardize")


def test_without_the_family_its_layers_are_recognised_by_what_they_do() -> None:
    model = network()
    report = bnprobe.scan(model, batches(), SIZE, num_batches=BATCHES)
    assert [layer.note for layer in report.layers] == [
        "normalizes by its own arithmetic, with moving_mean and moving_std (std)"
    ] * 2
    assert [layer.eps for layer in report.layers] == [1e-3] * 2
    for path in ("train", "eval"):
        measured = {layer.name: getattr(layer, path).mismatch for layer in report.layers}
        assert measured == pytest.approx(real_mismatches(model, path), rel=1e-4)

"""A scan of layers that correct themselves (Batch Renorm, gated BN) against these layers, run on real micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnprobe
from bnprobe.nn import BatchRenorm2d, GatedBatchNorm2d

Make = Callable[[], _BatchNorm]
LAYERS: dict[str, Make] = {
    "limits of BN": lambda: BatchRenorm2d(8, r_max=1, d_max=0),
    "narrow limits": lambda: BatchRenorm2d(8, r_max=1.1, d_max=0.1),
    "limits of the paper": lambda: BatchRenorm2d(8),
    "gated": lambda: GatedBatchNorm2d(8, blend=0.3),
}
SIZE, BATCHES = 2, 16


def network(r_max: float, d_max: float) -> nn.Sequential:
    return network_of(lambda: BatchRenorm2d(8, r_max=r_max, d_max=d_max))


def network_of(make: Make) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = make(), make()
    model = nn.Sequential(nn.Conv2d(1, 8, 3), first, nn.ReLU(), nn.Conv2d(8, 8, 3), second, nn.Flatten())
    for layer in (first, second):
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    with torch.no_grad():
        for batch in (torch.randn(8, 1, 8, 8) for _ in range(50)):
            model.train()(batch)
    return model


def batches() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(SIZE, 1, 8, 8, generator=generator),) for _ in range(BATCHES)]


def real_mismatches(model: nn.Module, path: str) -> dict[str, float]:
    """Mean squared difference of a layer's own training and inference outputs, weight and bias taken off, float64."""
    model = copy.deepcopy(model).double().train(path == "train")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    found: dict[str, list[float]] = {name: [] for name in layers}
    inputs: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda module, given, name=name: inputs.update({name: given[0].detach()}))
    for (images,) in batches():
        state = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            model(images.double())
        model.load_state_dict(state)
        for name, layer in layers.items():
            alone = copy.deepcopy(layer)
            with torch.no_grad():
                alone.weight.fill_(1)
                alone.bias.zero_()
                at_inference = alone.eval()(inputs[name])
                in_training = alone.train()(inputs[name])
            found[name].append(float((in_training - at_inference).square().mean()))
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_mismatch_is_what_the_correction_leaves(make: Make) -> None:
    model = network_of(make)
    report = bnprobe.scan(model, batches(), SIZE, num_batches=BATCHES)
    for path in ("train", "eval"):
        expected = real_mismatches(model, path)
        measured = {layer.name: getattr(layer, path).mismatch for layer in report.layers}
        assert measured == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_within_its_limits_training_is_inference() -> None:
    report = bnprobe.scan(network(10, 20), batches(), SIZE, num_batches=BATCHES)
    assert [layer.train.mismatch for layer in report.layers if layer.train] == [0, 0]
    assert report.summary.output.relative_l2 == pytest.approx(0, abs=1e-6)
    assert report.summary.flagged == 0
    for layer in report.layers:
        assert layer.shares is None
        assert layer.note is not None
        assert "r_max 10, d_max 20" in layer.note
        assert layer.train is not None
        assert layer.train.r.std > 0.05  # r and d are unclipped, whatever the layer does


def test_limits_of_one_and_zero_are_plain_bn() -> None:
    model = network(1, 0)
    plain = copy.deepcopy(model)
    for index in (1, 4):
        plain[index] = nn.BatchNorm2d(8)
    plain.load_state_dict(model.state_dict())
    renormed, expected = (bnprobe.scan(each, batches(), SIZE, num_batches=BATCHES) for each in (model, plain))
    for one, other in zip(renormed.layers, expected.layers, strict=True):
        assert one.train == other.train
        assert one.shares == other.shares
    assert renormed.summary.output == expected.summary.output


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_output_is_that_of_real_micro_batches(make: Make) -> None:
    """Grouped micro-batches against the model itself, one micro-batch after the other."""
    model = network_of(make)
    report = bnprobe.scan(model, batches(), SIZE, num_batches=BATCHES)
    assert report.scan.emulated
    trained = copy.deepcopy(model)
    square = norm = 0.0
    for (images,) in batches():
        trained.load_state_dict(model.state_dict())
        with torch.no_grad():
            in_training, at_inference = trained.train()(images), model.eval()(images)
        square += float((in_training - at_inference).square().sum())
        norm += float(at_inference.square().sum())
    assert report.summary.output.relative_l2 == pytest.approx((square / norm) ** 0.5, rel=1e-3)


def test_gradients_are_those_of_the_layer() -> None:
    """The share of a layer in the output, to first order and measured, needs Batch Renorm's own training pass."""
    model = network(1.1, 0.1)
    model[4].running_var.mul_(4)
    report = bnprobe.scan(model, batches(), SIZE, num_batches=BATCHES)
    impact = report.layers[1].impact
    assert impact is not None
    assert impact.exact is not None
    assert impact.estimate == pytest.approx(impact.exact, rel=0.25)

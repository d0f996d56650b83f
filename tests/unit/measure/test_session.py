"""How batches of every shape reach models of every kind."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bnprobe.commands.scan import scan
from bnprobe.errors import DataError, UserCodeError
from support.compare import assert_report_matches, assert_same_figures
from support.networks import Flat, Residual, images, unsettled

DATA = images(5, 4, 6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(4)),
        lambda x: [x, ["a"] * 4],
        lambda x: {"x": x, "label": torch.zeros(4)},
        lambda x: OrderedDict(image=x, label=torch.zeros(4)),
        lambda x: {"pixel_values": x},
    ],
    ids=["tensor", "tuple", "list", "mapping by parameter", "mapping by usual key", "mapping by another"],
)
def test_batches_of_every_shape(wrap: Any) -> None:
    model = unsettled(Flat())
    report = scan(model, [wrap(x) for x in DATA], 4, num_batches=5)
    assert report.scan.emulated
    assert report.layers == scan(model, DATA, 4, num_batches=5).layers


@pytest.mark.parametrize(
    ("batch", "words"),
    [({"a": DATA[0], "b": DATA[1]}, r"None of the batch's keys \(a, b\)"), (3, "batch of type int")],
)
def test_batches_that_need_a_forward(batch: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        scan(unsettled(Flat()), [batch] * 3, 4)
    assert "forward(model, batch)" in str(caught.value)


def test_a_batch_that_the_model_rejects() -> None:
    with pytest.raises(UserCodeError, match="calling the model") as caught:
        scan(unsettled(Flat()), images(4, 2, 7), 2)
    assert "shapes cannot be multiplied" in str(caught.value)


class ByHand(nn.BatchNorm2d):
    """Calls the functional form itself, as timm's does, then its activation."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = (None, None) if self.training else (self.running_mean, self.running_var)
        return F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, 0.1, self.eps).relu()


def test_a_layer_with_a_forward_of_its_own() -> None:
    model, data = unsettled(Residual(norm=ByHand)), images(5, 2, 3, 5, 5)
    report = scan(model, data, 2, num_batches=5)
    assert report.skipped == ()
    assert_report_matches(report, model, data, 2e-4)


class Checkpointed(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_activation_checkpointing_calls_each_layer_once() -> None:
    model, data = unsettled(Checkpointed()), images(5, 2, 3, 5, 5)
    report = scan(model, data, 2, num_batches=5)
    assert [layer.calls_per_forward for layer in report.layers] == [1, 1]
    assert_report_matches(report, model, data, 2e-4)


class Forgiving(Flat):
    """Calls a layer wrongly, and goes on without it."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            self.body[1](x[None, None])
        except ValueError:
            x = F.batch_norm(x, None, None, training=True)
        return super().forward(x)


def test_an_error_that_the_model_catches_leaves_no_layer_open() -> None:
    report = scan(unsettled(Forgiving()), DATA, 4, num_batches=5)
    assert [skipped.kind for skipped in report.skipped] == ["batch_norm"]
    assert [layer.calls_per_forward for layer in report.layers] == [1, 1]


@pytest.mark.parametrize("wrapper", ["compile", "DataParallel"])
def test_wrapped_models(wrapper: str) -> None:
    model, data = unsettled(Residual()), images(5, 2, 3, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own modules at first import
        wrapped = torch.compile(model, backend="eager") if wrapper == "compile" else nn.DataParallel(model)
        report = scan(wrapped, data, 2, num_batches=5)
    plain = scan(model, data, 2, num_batches=5)
    assert [layer.name.split(".")[-1] for layer in report.layers] == ["bn1", "bn2"]
    for layer, expected in zip(report.layers, plain.layers, strict=True):
        assert layer.train.mismatch == pytest.approx(expected.train.mismatch, rel=1e-6)
        assert layer.eval.mismatch == pytest.approx(expected.eval.mismatch, rel=1e-6)


def test_calls_that_vary_from_batch_to_batch() -> None:
    class Fickle(nn.Module):
        """Calls its layer twice where the batch says so."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = unsettled(nn.BatchNorm1d(6))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.norm(y + 1) if bool(x.sum() > 0) else y

    model = Fickle()
    report = scan(model, DATA, 4, num_batches=5, emulate=False)
    twice = sum(bool(x.sum() > 0) for x in DATA)
    assert 0 < twice < 5
    (layer,) = report.layers
    assert sum(layer.calls[0].train.r.histogram.counts) == 5 * 6
    assert sum(layer.calls[1].train.r.histogram.counts) == twice * 6
    assert_same_figures(report, scan(model, DATA, 4, num_batches=5), rel=1e-4)


class InEitherOrder(nn.Module):
    """Calls its two layers in an order that the first image decides."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] > 0:
            near, far = self.near(x), self.far(5 * x + 3)
        else:
            far, near = self.far(5 * x + 3), self.near(x)
        return near + far


def test_layers_that_are_called_in_another_order_from_batch_to_batch() -> None:
    model, data = unsettled(InEitherOrder()), images(9, 4, 3)
    assert len({bool(x[0, 0] > 0) for x in data}) == 2
    report = scan(model, data, 4, num_batches=9, physical_batch=4)
    assert_report_matches(report, model, data, 1e-5)

"""The output on both paths; loss and metric on real micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.commands.scan import scan
from bnprobe.errors import DataError, UserCodeError
from support.compare import kl
from support.networks import Flat, Residual, UNet, images, unsettled

LABELS = torch.randint(0, 3, (6, 4), generator=torch.Generator().manual_seed(1))
DATA = list(zip(images(6, 4, 6), LABELS, strict=True))


def spread(model: nn.Module, batch: Any) -> Tensor:
    """Not linear in the batch: that of a joint batch is another number."""
    return model(batch[0]).std() * batch[1].float().mean() ** 2


def by_hand(model: nn.Module, function: Callable[..., Any], data: list[Any], train: bool) -> float:
    """The mean over micro-batches, with torch's own layers."""
    twin = copy.deepcopy(model).train(train)
    with torch.no_grad():
        return sum(float(function(twin, batch)) for batch in data) / len(data)


@pytest.mark.parametrize("emulate", [True, False])
@pytest.mark.parametrize("forward", [None, lambda model, batch: model(batch[0])], ids=["default", "custom forward"])
def test_loss_and_metric_are_means_over_real_micro_batches(emulate: bool, forward: Any) -> None:
    model = unsettled(Flat())

    def accuracy(model: nn.Module, batch: Any) -> float:
        return float((model(batch[0]).argmax(1) == batch[1]).float().mean())

    report = scan(model, DATA, 4, num_batches=6, emulate=emulate, forward=forward, loss=spread, metric=accuracy)
    assert report.scan.emulated == emulate
    output = report.summary.output
    for path, train in (("train", True), ("eval", False)):
        assert getattr(output.loss, path) == pytest.approx(by_hand(model, spread, DATA, train), rel=1e-5)
        assert getattr(output.metric, path) == pytest.approx(by_hand(model, accuracy, DATA, train), abs=1e-9)
    assert output.loss.train != pytest.approx(output.loss.eval, rel=1e-3)


def test_a_loss_without_a_metric() -> None:
    output = scan(unsettled(Flat()), DATA, 4, num_batches=6, loss=spread).summary.output
    assert output.metric is None
    assert output.loss is not None


CALLS: list[int] = []
"""Images of each forward pass; outside the model, which comes back untouched."""


class Counting(Flat):
    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(x.shape[0])
        return super().forward(x)


@pytest.mark.parametrize("emulate", [True, False])
def test_a_loss_that_calls_the_model_costs_no_forward_pass(emulate: bool) -> None:
    model = unsettled(Counting())
    CALLS.clear()
    scan(model, DATA, 4, num_batches=6, emulate=emulate)
    without = list(CALLS)
    CALLS.clear()
    scan(model, DATA, 4, num_batches=6, emulate=emulate, loss=spread, metric=spread)
    assert without == CALLS


def test_a_loss_that_asks_for_something_else_gets_it() -> None:
    """Only the batch's own tensors are answered from what is there."""

    def consistency(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - model(batch[0] + 1)).square().mean()

    model = unsettled(Flat())
    report = scan(model, DATA, 4, num_batches=6, loss=consistency)
    assert report.scan.emulated
    expected = by_hand(model, consistency, DATA, train=True)
    assert report.summary.output.loss.train == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("emulate", [True, False])
def test_a_loss_that_writes_into_the_output_changes_nothing_else(emulate: bool) -> None:
    model = unsettled(Flat())

    def destructive(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).zero_().sum()

    def accuracy(model: nn.Module, batch: Any) -> float:
        return float((model(batch[0]).argmax(1) == batch[1]).float().mean())

    plain = scan(model, DATA, 4, num_batches=6, emulate=emulate, metric=accuracy).summary.output
    output = scan(model, DATA, 4, num_batches=6, emulate=emulate, loss=destructive, metric=accuracy).summary.output
    assert (output.relative_l2, output.metric) == (plain.relative_l2, plain.metric)


def test_a_loss_does_not_count_as_a_measurement() -> None:
    model = unsettled(Flat())
    plain = scan(model, DATA, 4, num_batches=6)
    with_loss = scan(model, DATA, 4, num_batches=6, forward=lambda model, batch: model(batch[0]), loss=spread)
    without = [replace(layer, impact=replace(layer.impact, loss=None)) for layer in with_loss.layers]
    assert without == list(plain.layers)
    assert all(layer.impact.loss is not None for layer in with_loss.layers)


@pytest.mark.parametrize("name", ["loss", "metric"])
def test_more_than_one_number_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=rf"{name}\(model, batch\) .*test_outputs.py:\d+\) returned a tensor of shape \(4,\), but it must return one number"):
        scan(unsettled(Flat()), DATA, 4, num_batches=6, **{name: lambda model, batch: torch.ones(4)})


def test_an_exception_in_the_loss() -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("weights")

    with pytest.raises(UserCodeError, match=r"calling loss\(model, batch\) \(train path\)") as caught:
        scan(unsettled(Flat()), DATA, 4, num_batches=6, loss=broken)
    assert "test_outputs.py" in caught.value.frames


def test_a_gradient_is_not_needed_of_a_loss() -> None:
    report = scan(unsettled(Flat()), DATA, 4, num_batches=6, loss=lambda model, batch: torch.tensor([[2.5]]))
    assert (report.summary.output.loss.train, report.summary.output.loss.eval) == (2.5, 2.5)


class Scores(nn.Module):
    """A layer and a last step."""

    def __init__(self, last: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.last = unsettled(nn.BatchNorm1d(3)), last

    def forward(self, x: Tensor) -> Any:
        return self.last(self.norm(x) * 2)


@pytest.mark.parametrize(
    "last", [lambda x: x, lambda x: x.softmax(1), lambda x: x.log_softmax(1)], ids=["logits", "probabilities", "log"]
)
def test_class_scores_of_every_scale_give_the_same_divergence(last: Callable[[Tensor], Tensor]) -> None:
    data = images(6, 4, 3)
    model = Scores(last)
    output = scan(model, data, 4, num_batches=6).summary.output
    plain = {}
    for train in (True, False):
        twin = copy.deepcopy(model.norm).train(train)
        plain[train] = torch.cat([twin(x) * 2 for x in data]).detach().double()
    assert output.kl_divergence == pytest.approx(kl(plain[True], plain[False]), rel=1e-4)
    changed = (plain[True].argmax(1) != plain[False].argmax(1)).double().mean()
    assert output.argmax_changed == pytest.approx(float(changed))


def test_scores_for_every_position() -> None:
    model = unsettled(UNet())
    x = images(5, 2, 3, 8, 8)
    labelled = [(image, torch.zeros(2, 8, 8, dtype=torch.int64)) for image in x]
    output = scan(model, labelled, 2, num_batches=5).summary.output
    scores = {}
    for train in (True, False):
        twin = copy.deepcopy(model).train(train)
        scores[train] = torch.cat([twin(image) for image in x]).detach().double()
    changed = (scores[True].argmax(1) != scores[False].argmax(1)).double().mean()
    assert output.argmax_changed == pytest.approx(float(changed))
    p, q = scores[False].log_softmax(1), scores[True].log_softmax(1)
    assert output.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    # Without labels an image is no table of scores.
    assert scan(model, x, 2, num_batches=5).summary.output.kl_divergence is None


def test_a_single_column_is_no_class_score() -> None:
    output = scan(Scores(lambda x: x.sum(1, keepdim=True)), images(6, 4, 3), 4, num_batches=6).summary.output
    assert (output.argmax_changed, output.kl_divergence) == (None, None)
    assert output.relative_l2 > 0


def test_all_outputs_count() -> None:
    single = scan(Scores(lambda x: x), images(6, 4, 3), 4, num_batches=6).summary.output
    nested = scan(Scores(lambda x: {"a": x, "b": [x, x.argmax(1)]}), images(6, 4, 3), 4, num_batches=6).summary.output
    assert nested.relative_l2 == pytest.approx(single.relative_l2, rel=1e-6)


def test_no_output_to_compare() -> None:
    output = scan(Scores(lambda x: None), images(6, 4, 3), 4, num_batches=6).summary.output
    assert output.relative_l2 is None
    assert "no floating-point tensor" in output.note


def test_outputs_of_other_shapes_cannot_be_compared() -> None:
    class Auxiliary(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return F.pad(y, (0, 2)) if self.training else y

    output = scan(unsettled(Auxiliary()), images(6, 4, 3, 5, 5), 4, num_batches=6).summary.output
    assert output.relative_l2 is None
    assert "different shapes" in output.note

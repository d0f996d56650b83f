"""The output on both paths; loss and metric on real micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bnprobe.commands.scan import scan
from bnprobe.config.spec import ScanSettings
from bnprobe.errors import DataError, UserCodeError
from bnprobe.measure.batch import MicroBatch
from bnprobe.measure.outputs import ClassScores
from bnprobe.measure.physical_batch import Batching, Emulation
from bnprobe.measure.scores import ScoreTable, score_batches
from bnprobe.measure.session import Session, UserFunctions
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
def test_a_loss_that_calls_the_model_costs_one_forward_pass(emulate: bool) -> None:
    """Of the first step: whether train mode does more than normalize otherwise."""
    model = unsettled(Counting())
    CALLS.clear()
    scan(model, DATA, 4, num_batches=6, emulate=emulate)
    without = list(CALLS)
    CALLS.clear()
    scan(model, DATA, 4, num_batches=6, emulate=emulate, loss=spread, metric=spread, what_if=False)
    assert len(CALLS) == len(without) + 1
    left = list(CALLS)
    for size in without:
        left.remove(size)
    assert left in ([4], [8], [24])


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
    plain = scan(model, DATA, 4, num_batches=6, thorough=True)
    forward = lambda model, batch: model(batch[0])  # noqa: E731
    with_loss = scan(model, DATA, 4, num_batches=6, forward=forward, loss=spread, thorough=True)
    without = [replace(layer, impact=replace(layer.impact, loss=None)) for layer in with_loss.layers]
    assert without == list(plain.layers)
    assert all(layer.impact.loss is not None for layer in with_loss.layers)


@pytest.mark.parametrize("name", ["loss", "metric"])
def test_more_than_one_number_is_refused(name: str) -> None:
    where = rf"{name}\(model, batch\) .*test_outputs.py:\d+\)"
    with pytest.raises(
        DataError, match=rf"{where} returned a tensor of shape \(4,\) and dtype torch.float32, but it must"
    ):
        scan(unsettled(Flat()), DATA, 4, num_batches=6, **{name: lambda model, batch: torch.ones(4)})


def test_an_exception_in_the_loss() -> None:
    def broken(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("weights")

    with pytest.raises(UserCodeError, match=r"calling loss\(model, batch\) \(training\)") as caught:
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


def test_a_label_beyond_the_classes_that_comes_later_is_ignored() -> None:
    labels = [labels.clone() for labels in LABELS]
    labels[3][1] = 255
    report = scan(Flat(), list(zip(images(6, 4, 6), labels, strict=True)), 4, num_batches=6, physical_batch=8)
    assert report.scan.batches == 6


def test_a_single_column_is_no_class_score() -> None:
    output = scan(Scores(lambda x: x.sum(1, keepdim=True)), images(6, 4, 3), 4, num_batches=6).summary.output
    assert (output.argmax_changed, output.kl_divergence) == (None, None)
    assert output.relative_l2 > 0


def test_all_outputs_count() -> None:
    single = scan(Scores(lambda x: x), images(6, 4, 3), 4, num_batches=6).summary.output
    nested = scan(Scores(lambda x: {"a": x, "b": [x, x.argmax(1)]}), images(6, 4, 3), 4, num_batches=6).summary.output
    assert nested.relative_l2 == pytest.approx(single.relative_l2, rel=1e-6)


@dataclass(frozen=True)
class Found:
    logits: Tensor
    features: list[Tensor]


@pytest.mark.parametrize("emulate", [True, False])
def test_outputs_in_a_dataclass_count(emulate: bool) -> None:
    class Wrapped(Flat):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return Found(logits, [logits.square()])

    def score(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return F.cross_entropy(out.logits if isinstance(out, Found) else out, batch[1])

    model, wrapped = unsettled(Flat()), unsettled(Wrapped())
    wrapped.load_state_dict(model.state_dict())
    report, plain = (scan(each, DATA, 4, num_batches=6, loss=score, emulate=emulate) for each in (wrapped, model))
    assert report.summary.output.relative_l2 > 0
    assert report.summary.output.note is None
    assert report.summary.gaps == plain.summary.gaps


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


class AlwaysRandom(Flat):
    """Dropout without ``training=``: active in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.3))


class OwnGenerator(Flat):
    """Random at inference, from a generator that a seed does not reach."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn(x.shape, generator=GENERATOR))


GENERATOR = torch.Generator().manual_seed(0)


class DropoutLayer(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Dropout(0.5), Flat())


@pytest.mark.parametrize(
    ("made", "random"), [(Flat, False), (DropoutLayer, False), (AlwaysRandom, True), (OwnGenerator, True)]
)
def test_two_eval_passes_tell_whether_inference_is_random(made: type[nn.Module], random: bool) -> None:
    output = scan(unsettled(made()), DATA, 4, num_batches=6).summary.output
    assert (output.repeat > 0.05) if random else (output.repeat == 0)


def test_asking_whether_inference_is_random_draws_nothing() -> None:
    """The figures are those of passes in their order."""
    torch.manual_seed(0)
    model = unsettled(AlwaysRandom())
    once, again = (scan(model, DATA, 4, num_batches=6, loss=spread).summary for _ in range(2))
    assert once == again


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: Any) -> float:
    return float((model(batch[0]).argmax(1) == batch[1]).float().mean())


def table_of(model: nn.Module, emulate: bool = True, **functions: Any) -> ScoreTable:
    """The eval path on all the data."""
    session = Session.open(model, ScanSettings(), UserFunctions(**functions))
    emulation = Emulation(emulate, "", None, {})
    with session.installed():
        return score_batches(session, "eval", [MicroBatch(batch, 4) for batch in DATA], Batching(4, emulation, 3))


@pytest.mark.parametrize("emulate", [True, False])
def test_means_over_samples_are_known_by_sample(emulate: bool) -> None:
    model = unsettled(Flat())
    table = table_of(model, emulate, loss=cross_entropy, metric=accuracy)
    twin = copy.deepcopy(model).eval()
    singles = [(x[row : row + 1], y[row : row + 1]) for x, y in DATA for row in range(4)]
    with torch.no_grad():
        for measure, function in (("loss", cross_entropy), ("metric", accuracy)):
            slow = torch.tensor([float(function(twin, single)) for single in singles], dtype=torch.float64)
            torch.testing.assert_close(table.scores(measure, "eval").samples, slow, rtol=1e-5, atol=1e-6)


def raises(model: nn.Module, batch: Any) -> Tensor:
    assert len(batch[1]) > 1
    return cross_entropy(model, batch)


def undefined(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).std(0).mean()


def another_input(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0] * 2), batch[1])


@pytest.mark.parametrize("function", [spread, raises, undefined, another_input])
def test_other_functions_are_known_by_micro_batch(function: Callable[..., Any]) -> None:
    scores = table_of(unsettled(Flat()), loss=function).scores("loss", "eval")
    assert scores.samples is None
    assert len(scores.batches) == len(DATA)


def test_single_samples_draw_nothing_from_the_random_state() -> None:
    def drawing(model: nn.Module, batch: Any) -> Tensor:
        torch.rand(1)
        return cross_entropy(model, batch)

    table_of(unsettled(Flat()), loss=drawing)
    torch.manual_seed(0)
    session_draws = len(DATA)
    table_of(unsettled(Flat()), loss=drawing)
    after = torch.rand(1)
    torch.manual_seed(0)
    unsettled(Flat())
    for _ in range(session_draws):
        torch.rand(1)
    assert torch.rand(1) == after


@pytest.mark.parametrize(
    ("value", "said"), [(None, "None.*return statement"), ({"loss": 1.0}, "a dict"), ("good", "the text 'good'")]
)
def test_what_is_no_number_is_refused_with_the_line_of_the_function(value: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"loss\(model, batch\) .*test_outputs.py:\d+\) returned {said}"):
        scan(unsettled(Flat()), DATA, 4, num_batches=6, loss=lambda model, batch: value)


@pytest.mark.parametrize("value", [[0.5], np.float32(0.5), torch.tensor([[0.5]]), True, 0.5])
def test_what_is_one_number_is_taken(value: Any) -> None:
    output = scan(unsettled(Flat()), DATA, 4, num_batches=6, loss=lambda model, batch: value).summary.output
    assert output.loss.eval == pytest.approx(float(np.asarray(value).reshape(())))


HELD_OUT = images(1, 22, 6)[0] * 2 + 1, torch.randint(0, 3, (22,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("batches", [6, 1])
@pytest.mark.parametrize("size", [4, 11, 30])
def test_held_out_data_is_measured_whole_whatever_the_size_of_its_batches(size: int, batches: int) -> None:
    """Also from one micro-batch of training data: the data shift has an interval over samples."""
    model = unsettled(Flat())

    def shifts(size: int) -> tuple[Any, list[Any]]:
        parts = zip(*(part.split(size) for part in HELD_OUT), strict=True)  # an iterator keeps its order
        report = scan(model, DATA[:batches], 4, evaluation=parts, loss=cross_entropy)
        layers = [(layer.shares.data_shift, *layer.share_intervals.data_shift) for layer in report.layers]
        return report.summary.gaps[0], layers

    gap, layers = shifts(size)
    assert (gap.samples, gap.held_out_samples) == (4 * batches, 22)
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        assert gap.held_out == pytest.approx(float(cross_entropy(twin, HELD_OUT)), rel=1e-5)
    assert gap.generalization_interval is not None
    np.testing.assert_allclose(layers, shifts(1)[1], rtol=1e-4)


def test_loss_and_metric_go_on_after_the_layers_are_decided() -> None:
    data = list(zip(images(80, 4, 6), torch.randint(0, 3, (80, 4)), strict=True))
    model = unsettled(Flat())
    gap = scan(model, data, 4, loss=cross_entropy, max_batches=70).summary.gaps[0]
    assert gap.samples >= 256
    exact = scan(model, data, 4, loss=cross_entropy, num_batches=gap.samples // 4).summary.gaps[0]
    assert gap.inconsistency == pytest.approx(exact.inconsistency)
    assert gap.inconsistency_interval == pytest.approx(exact.inconsistency_interval)
    assert scan(model, data, 4, loss=cross_entropy, max_batches=20).summary.gaps[0].samples <= 80


def test_labels_are_counted_by_class_but_for_those_to_be_ignored() -> None:
    scores, labels = torch.randn(2, 3, 4), torch.tensor([[0, 2, 2, -100], [255, 1, 2, 3]])
    found = ClassScores(0, False, 1).measure(scores, scores + 1, labels)
    assert found["labels"].tolist() == [1.0, 1.0, 3.0]


def test_class_scores_are_compared_without_a_look_at_values() -> None:
    """A GPU would be waited for in every step."""
    with FakeTensorMode():  # has no values to look at
        scores, labels = torch.randn(8, 3), torch.randint(3, (8,))
        ClassScores(0, False, 1).measure(scores, scores + 1, labels)

"""Small measurements that tell causes apart."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnprobe import scan
from bnprobe.measure.causes import SAMPLES_OF_EPS, SAMPLES_OF_HINT, padding_in, random_layers_before
from bnprobe.measure.layers import anatomy, find_layers
from bnprobe.records import Report
from support.running import session_of

CLASSES = 4


def settled(model: nn.Module, x: Tensor, passes: int = 60) -> nn.Module:
    """The model with the running statistics of its data."""
    model.train()
    with torch.no_grad():
        for _ in range(passes):
            model(x[torch.randperm(len(x))[:64]])
    return model


def classed(seed: int = 0, number: int = 512) -> tuple[Tensor, Tensor]:
    """Points around the mean of their class, of different spread in each channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    centres = torch.eye(CLASSES, 6) * 3
    return centres[labels] + torch.randn(number, 6, generator=generator), labels


def batches(size: int = 32) -> list[tuple[Tensor, Tensor]]:
    x, y = classed()
    return list(zip(x.split(size), y.split(size), strict=True))


def forward(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float().mean()


def scanned(model: nn.Module, data: list[Any], **options: Any) -> Report:
    given = {"forward": forward, "loss": loss, "metric": accuracy, **options}
    return scan(model, data, len(data[0][0]), num_batches=len(data), **given)


def stale(weights: Tensor | None = None) -> nn.Module:
    """A network of fixed weights whose statistics are off, so that something is to be explained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, CLASSES, bias=False))
    settled(model, classed()[0])
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(CLASSES, 6) * 3 if weights is None else weights)
        model[0].running_mean[:2] += 6
    return model


def causes(report: Report) -> list[str]:
    return [found.cause for found in report.diagnoses]


def test_outputs_of_other_samples_score_what_a_loop_over_batches_gives() -> None:
    model, data = stale(), batches()
    found = {each.measure: each for each in scanned(model, data).summary.chance}
    taken = data[: 256 // 32]
    twin = copy.deepcopy(model).train().requires_grad_(False)
    outputs = [twin(x) for x, _ in taken]
    others = [outputs[(place + len(taken) // 2) % len(taken)] for place in range(len(taken))]
    for measure, function in (("loss", F.cross_entropy), ("metric", lambda z, y: (z.argmax(1) == y).float().mean())):
        own = torch.stack([function(z, y) for z, (_, y) in zip(outputs, taken, strict=True)]).mean()
        other = torch.stack([function(z, y) for z, (_, y) in zip(others, taken, strict=True)]).mean()
        training = found[measure].training
        assert (training.own, training.other) == pytest.approx((float(own), float(other)), rel=1e-5)
    assert found["metric"].training.own > 0.8
    assert found["metric"].training.other == pytest.approx(1 / CLASSES, abs=0.1)


def test_weights_that_predict_nothing_are_named_instead_of_their_statistics() -> None:
    noise = torch.zeros(CLASSES, 6)
    noise[:, 5] = 1e-2 * torch.arange(CLASSES)  # a channel that is the same for all classes
    assert causes(scanned(stale(noise), batches())) == ["untrained_weights"]
    assert causes(scanned(stale(), batches())) == ["lag"]


def test_a_loss_of_the_outputs_alone_says_nothing_about_chance() -> None:
    report = scanned(stale(), batches(), loss=lambda model, batch: model(batch[0]).square().mean(), metric=None)
    assert report.summary.chance == ()


def test_outputs_that_depend_on_the_batch_are_an_error_without_running_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, CLASSES))
    report = scanned(model, batches(8))
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    differences = norms = 0.0
    data = [x for x, _ in batches(8)]
    for one, other in zip(data[::2], data[1::2], strict=True):
        mixed = twin(torch.cat([one[:4], other[:4]]))
        for alone, again in ((twin(one)[:4], mixed[:4]), (twin(other)[:4], mixed[4:])):
            differences += float((alone - again).square().sum())
            norms += float(alone.square().sum())
    assert report.summary.output.batch_dependence == pytest.approx((differences / norms) ** 0.5, rel=1e-4)
    assert [(found.cause, found.severity) for found in report.diagnoses] == [("no_running_stats", "error")]
    tracked = scanned(settled(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, CLASSES)), classed()[0]), batches())
    assert tracked.summary.output.batch_dependence is None


def with_another_eps() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """Settled with eps=1e-2, and left with 1e-6; most inputs have a variance that is small beside the first."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.BatchNorm1d(6, eps=1e-2), nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16, eps=1e-2), nn.Linear(16, CLASSES)
    )
    x = classed()[0] * torch.tensor([0.02, 0.02, 0.02, 0.02, 1.0, 1.0])
    data = [(part, label) for part, (_, label) in zip(x.split(64), batches(64), strict=True)]
    settled(model, x, passes=300)
    for norm in (model[0], model[3]):
        norm.eps = 1e-6
    return model, data


def messages_of(report: Report) -> dict[str | None, str]:
    """What is said of stale statistics, by layer."""
    return {each.layer: each.message for each in report.verdicts if each.cause == "lag" and each.outcome == "failed"}


def test_another_eps_is_found() -> None:
    model, data = with_another_eps()
    told = messages_of(scanned(model, data, metric=None))
    assert "eps is 1e-06, and was 0.01 when the weights were trained" in told["3"]
    assert (model[0].eps, model[3].eps) == (1e-6, 1e-6)


def test_another_eps_is_found_behind_a_first_layer_that_is_stale_and_counts_in_that_too() -> None:
    model, data = with_another_eps()
    model[0].running_mean[:4] += 0.5 * model[0].running_var[:4].sqrt()  # little beside eps=1e-2
    told = messages_of(scanned(model, data, metric=None))
    assert ["eps is 1e-06, and was 0.01" in told[name] for name in ("0", "3")] == [True, True]


class InTurn(nn.Module):
    """Calls its norms, and in every second call another one before them."""

    def __init__(self, norms: nn.Sequential) -> None:
        super().__init__()
        self.norms, self.other, self.calls = norms, nn.BatchNorm1d(6), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norms(x if self.calls % 2 else self.other(x))


def test_another_eps_is_tried_on_the_model_as_it_is_deployed() -> None:
    """Not as a pass left it: what it set is put back before the next one."""
    plain, data = with_another_eps()
    model = InTurn(plain)
    told, expected = (messages_of(scanned(each, data, metric=None)) for each in (model, plain))
    assert told == {f"norms.{name}": message for name, message in expected.items()}
    assert model.calls == 0


def test_a_layer_whose_input_does_not_depend_on_eps_says_nothing_of_it() -> None:
    assert "eps" not in messages_of(scanned(stale(), batches()))["0"]


def test_another_eps_is_tried_only_where_statistics_are_stale() -> None:
    fitting = settled(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, CLASSES)), classed()[0], passes=300)
    small, old = scanned(fitting, batches(4)), scanned(stale(), batches())
    assert small.diagnoses[0].cause == "small_batch"
    assert old.diagnoses[0].cause == "lag"
    assert ["eps" in {each.name for each in report.scan.passes} for report in (small, old)] == [False, True]


def test_another_eps_is_tried_on_more_samples_only_where_few_give_a_hint() -> None:
    model, data = with_another_eps()
    x, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    small = list(zip(x.split(4), labels.split(4), strict=True))
    of_eps, old = scanned(model, small, metric=None), scanned(stale(), batches(4))
    assert "eps is 1e-06, and was 0.01 when the weights were trained" in messages_of(of_eps)["3"]
    tried = [next(each.images for each in report.scan.passes if each.name == "eps") for report in (of_eps, old)]
    assert tried == [SAMPLES_OF_EPS, SAMPLES_OF_HINT]


def test_a_scan_that_ends_beyond_its_two_paths_says_where() -> None:
    """Interrupted in the last call of the loss."""
    calls = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == last:
            raise KeyboardInterrupt
        return loss(model, batch)

    last = 0
    whole = scanned(stale(), batches(4)[:16], loss=counted, metric=None)
    last = len(calls)
    calls.clear()
    report = scanned(stale(), batches(4)[:16], loss=counted, metric=None)
    assert [report.scan.stopped, report.scan.batches] == ["interrupted", whole.scan.batches]
    done = [each.name for each in report.scan.passes]
    missed = whole.scan.passes[len(done)]
    assert done == [each.name for each in whole.scan.passes[: len(done)]]
    ended = f"The scan ended in a measurement beyond the two paths: {missed.name} ({missed.reason})."
    assert ended in report.scan.notes


USED: set[float] = set()
"""Every eps that ``Noting`` was called with; a scan would put back what hangs on the module."""


class Noting(nn.Module):
    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        USED.add(self.model[0].eps)
        return self.model(x)


def test_an_eps_that_scales_no_channel_otherwise_is_not_tried() -> None:
    """Beside variances of one and more, as those of this data, 1e-6 and 1e-8 are what 1e-5 is."""
    USED.clear()
    scanned(Noting(stale()), batches(32))
    assert sorted(USED) == [1e-5, 1e-3, 1e-2]


def test_random_layers_are_traced_through_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Dropout2d(0.5), nn.BatchNorm2d(4)
    )
    session = session_of(model)
    with session.installed():
        found = random_layers_before(session, torch.randn(4, 3, 6, 6), 4)
    assert found == {"2": ("1",), "5": ("1", "4")}


class Branches(nn.Module):
    """Dropout in one branch, BN in a parallel one and behind the dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.again = nn.Dropout(0.1)
        self.beside, self.behind = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.beside(x) + self.behind(self.again(torch.relu(self.drop(x))) + x)


def test_random_layers_are_traced_and_not_taken_in_the_order_of_definition() -> None:
    model = settled(Branches(), classed()[0])
    report = scan(model, [x for x, _ in batches()], 32, num_batches=16)
    told = {each.layer: (each.outcome, each.message) for each in report.verdicts if each.rule == "BN107"}
    assert told["beside"][0] == told["first"][0] == "passed"
    # What is traced is named wherever the rule speaks of it, nearest first.
    assert "again, drop" in told["behind"][1]


@pytest.mark.parametrize(("lengths", "found"), [((9, 6), True), ((9, 9), False)])
def test_padding_is_looked_for_where_sizes_differ(lengths: tuple[int, int], found: bool) -> None:
    made = []
    for length in lengths:
        x = torch.randn(2, 3, length)
        x[1, :, 3:] = 0.0
        made.append((x, torch.zeros(2)))
    padding = padding_in(made, made[:1])
    assert (padding is not None) == found
    if padding is not None:
        assert padding.training == pytest.approx((6 / 9 / 2 + 3 / 6 / 2) / 2)
        assert padding.held_out == pytest.approx(6 / 9 / 2)


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        (lambda net: net[1].weight.mul_(2), "affine_moved", True),
        (lambda net: None, "affine_moved", False),
        (lambda net: net[0].weight[:, :, 1:].zero_(), "zeros", pytest.approx(2 / 3, abs=0.01)),
        (lambda net: net[0].weight.copy_((net[0].weight * 40).round() / 40), "levels", 7),
        (lambda net: net[1].running_var.copy_(net[1].running_var.bfloat16()), "bfloat16", False),
    ],
)
def test_what_the_model_alone_shows(change: Callable[[nn.Sequential], Any], field: str, value: object) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))
    settled(net, torch.randn(64, 16, 6, 6), passes=5)
    with torch.no_grad():
        change(net)
    [found] = anatomy(find_layers(net, lambda *names: True), net)
    assert getattr(found, field) == value


def test_statistics_kept_in_bfloat16_are_seen() -> None:
    net = settled(nn.Sequential(nn.BatchNorm1d(16)), torch.randn(64, 16))
    for buffer in (net[0].running_mean, net[0].running_var):
        buffer.copy_(buffer.bfloat16())
    [found] = anatomy(find_layers(net, lambda *names: True), net)
    assert found.bfloat16


class Momentum(nn.Module):
    """An encoder and its copy, as in contrastive learning."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.other = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()).requires_grad_(False)


def test_a_momentum_encoder_is_no_half_frozen_layer() -> None:
    model = Momentum()
    found = anatomy(find_layers(model, lambda *names: True), model)
    assert {one.name: one.copy_of for one in found} == {"query.1": None, "key.1": "query", "other.1": None}

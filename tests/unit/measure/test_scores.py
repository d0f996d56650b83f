"""Loss and metric by sample: what single samples are, and how often the user's functions are called."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.config.spec import ScanSettings
from bnprobe.measure.batch import MicroBatch, one_by_one, pick, tensors_of
from bnprobe.measure.forward_pass import Pass
from bnprobe.measure.physical_batch import Batching, Emulation
from bnprobe.measure.scores import ScoreTable, score_batches
from bnprobe.measure.session import Session, UserFunctions, outputs_one_by_one, rows_of
from tests.support.networks import unsettled

SIZE = 2
"""Samples in a micro-batch."""


class Named(NamedTuple):
    images: Tensor
    ids: list[str]


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, Tensor]


BATCHES = {
    "tensor": torch.arange(6.0).view(3, 2),
    "tuple": (torch.arange(6.0).view(3, 2), torch.arange(3)),
    "as many fields as samples": (torch.arange(3.0), torch.arange(3), torch.ones(3, 2)),
    "dict": {"x": torch.arange(6.0).view(3, 2), "names": ["a", "b", "c"], "weights": torch.ones(5), "scale": 2.0},
    "other mapping": OrderedDict(x=torch.arange(3.0), nested={"y": [torch.arange(3)]}),
    "images of different sizes": ([torch.ones(1), torch.ones(2), torch.ones(3)], torch.arange(3)),
    "named tuple": Named(torch.arange(3.0), ["a", "b", "c"]),
    "empty": (torch.arange(3.0), {}, ()),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_samples_one_by_one_are_those_that_are_picked(kind: str) -> None:
    batch = BATCHES[kind]
    found = one_by_one(batch, 3)
    expected = [pick(batch, [row], 3) for row in range(3)]
    assert str(found) == str(expected)


@pytest.mark.parametrize("kind", BATCHES)
def test_writing_into_a_sample_changes_nothing_else(kind: str) -> None:
    batch = copy.deepcopy(BATCHES[kind])
    found = one_by_one(batch, 3)
    before = str(found[1:])
    for tensor in tensors_of(found[0]):
        tensor += 1
    assert (str(batch), str(found[1:])) == (str(BATCHES[kind]), before)


def test_outputs_one_by_one_are_those_of_a_sample() -> None:
    logits = torch.arange(6.0).view(3, 2)
    outputs = {(0,): Output(logits, (logits + 1, logits + 2)), (1,): [logits], (2,): logits.sum(), (3,): None}
    found = outputs_one_by_one(outputs, 3)
    assert str(found) == str([rows_of(outputs, row, row + 1, 3) for row in range(3)])
    found[0][0,].logits += 1
    assert torch.equal(logits, torch.arange(6.0).view(3, 2))


class Flat(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def made() -> nn.Module:
    torch.manual_seed(0)
    return unsettled(Flat())


def held_out(batches: int, last: int = SIZE) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(1)
    sizes = [SIZE] * (batches - 1) + [last]
    images = [torch.randn(size, 3, 6, 6, generator=generator) for size in sizes]
    labels = [torch.randint(3, (size,), generator=generator) for size in sizes]
    return [MicroBatch(batch, size) for *batch, size in zip(images, labels, sizes, strict=True)]


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def counting(function: Callable[..., Any], calls: Counter[int]) -> Callable[..., Any]:
    def counted(model: nn.Module, batch: Any) -> Any:
        calls[len(batch[1])] += 1
        return function(model, batch)

    return counted


def table_of(
    function: Callable[..., Any], batches: list[MicroBatch], at_once: int, together: bool = True, **options: Any
) -> ScoreTable:
    session = Session.open(made(), ScanSettings(), UserFunctions(loss=function))
    batching = Batching(SIZE, Emulation(together, "", None, {}), at_once)
    with session.installed():
        return score_batches(session, "eval", batches, batching, **options)


def by_hand(function: Callable[..., Any], batches: list[MicroBatch]) -> Tensor:
    """Of each micro-batch by itself, in float64."""
    model = made().double().eval()
    with torch.no_grad():
        return torch.stack([function(model, (batch.data[0].double(), batch.data[1])) for batch in batches])


def test_a_mean_over_samples_is_taken_of_samples_once_it_is_known() -> None:
    calls: Counter[int] = Counter()
    batches = held_out(40, last=1)
    table = table_of(counting(cross_entropy, calls), batches, at_once=20)
    # Of the first twenty each by itself, of the next nineteen all together; then each of the samples, the last is one.
    assert calls == {SIZE: 20, 38: 1, 1: 40 + 38 + 1}
    scores = table.scores("loss", "eval")
    torch.testing.assert_close(scores.batches, by_hand(cross_entropy, batches), rtol=1e-5, atol=1e-6)
    singles = [MicroBatch((x[row : row + 1], y[row : row + 1]), 1) for (x, y), size in batches for row in range(size)]
    torch.testing.assert_close(scores.samples, by_hand(cross_entropy, singles), rtol=1e-5, atol=1e-6)


def test_what_another_table_knows_needs_no_micro_batches() -> None:
    calls: Counter[int] = Counter()
    batches = held_out(8)
    known = table_of(cross_entropy, held_out(16), at_once=16).known_means()
    table = table_of(counting(cross_entropy, calls), batches, at_once=8, means=known)
    assert (known, calls) == ({"loss"}, {16: 1, 1: 16})
    expected = by_hand(cross_entropy, batches)
    torch.testing.assert_close(table.scores("loss", "eval").batches, expected, rtol=1e-5, atol=1e-6)


def test_samples_that_are_of_no_use_are_not_scored() -> None:
    calls: Counter[int] = Counter()
    batches = held_out(9, last=1)
    table = table_of(counting(cross_entropy, calls), batches, at_once=4, most=0, means=frozenset({"loss"}))
    assert calls == {8: 2, 1: 1}
    sizes = torch.tensor([float(batch.samples) for batch in batches], dtype=torch.float64)
    mean = (by_hand(cross_entropy, batches) * sizes).sum() / sizes.sum()
    assert table.score("eval").loss == pytest.approx(float(mean), rel=1e-5)


def of_the_batch(model: nn.Module, batch: Any) -> Tensor:
    """A mean over samples, but for the labels 0, whose worst sample counts."""
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return losses.max() if bool((batch[1] == 0).all()) else losses.mean()


def raising(model: nn.Module, batch: Any) -> Tensor:
    if len(batch[1]) > SIZE:
        raise ValueError("too many")
    return cross_entropy(model, batch)


def test_a_figure_that_ceases_to_be_a_mean_is_taken_of_micro_batches() -> None:
    batches = held_out(40)
    batches[20:] = [MicroBatch((images, torch.zeros_like(labels)), size) for (images, labels), size in batches[20:]]
    scores = table_of(of_the_batch, batches, at_once=20).scores("loss", "eval")
    assert scores.samples is None
    torch.testing.assert_close(scores.batches, by_hand(of_the_batch, batches), rtol=1e-5, atol=1e-6)


def test_a_function_that_refuses_larger_batches_sees_micro_batches() -> None:
    batches = held_out(40)
    scores = table_of(raising, batches, at_once=20).scores("loss", "eval")
    assert len(scores.samples) == 80
    torch.testing.assert_close(scores.batches, by_hand(raising, batches), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("draws", "together", "sizes"), [(False, True, [8, 72]), (True, True, [8] * 10), (False, False, [SIZE] * 40)]
)
def test_more_of_a_small_network_run_at_once_where_nothing_is_drawn(
    draws: bool, together: bool, sizes: list[int]
) -> None:
    """What a model draws at inference depends on what runs together."""
    batches, seen, model = held_out(40), list[int](), made()
    session = Session.open(model, ScanSettings(), UserFunctions(loss=cross_entropy))

    def hook(module: nn.Module, inputs: Any) -> None:
        seen.append(len(inputs[0]))
        if draws:
            torch.rand(1)

    model[0].register_forward_pre_hook(hook)
    with session.installed():
        table = score_batches(session, "eval", batches, Batching(SIZE, Emulation(together, "", None, {}), 4))
    assert seen == sizes
    expected = by_hand(cross_entropy, batches)
    torch.testing.assert_close(table.scores("loss", "eval").batches, expected, rtol=1e-5, atol=1e-6)


def test_a_pass_that_records_no_moments_gives_the_same_outputs() -> None:
    session = Session.open(made(), ScanSettings())
    images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    statistics = {0: (torch.full((4,), 0.3).double(), torch.full((4,), 2.0).double())}
    with session.installed():
        for options in ({}, {"statistics": statistics}, {"by_batch": frozenset({0})}):
            passes = [Pass(8, SIZE, moments=moments, **options) for moments in (True, False)]
            outputs = [session.forward("eval", images, pass_)[0] for pass_ in passes]
            assert torch.equal(*outputs)
            assert [len(pass_.records) for pass_ in passes] == [1, int("by_batch" in options)]

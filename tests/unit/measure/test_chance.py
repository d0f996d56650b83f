"""Outputs of other samples are those that the paths gave: nothing runs again for them where they were kept."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.config.spec import ScanSettings
from bnprobe.measure.chance import KeptOutputs, chance_levels
from bnprobe.measure.evidence import Evidence
from bnprobe.measure.reader import Reader
from bnprobe.measure.scan_loop import probe
from bnprobe.measure.session import Session, UserFunctions, no_progress
from bnprobe.records import Chance
from support.networks import images, unsettled

SIZE = 4

PASSED: list[int] = []
"""Samples of every forward pass; not in the model, whose attributes come back as they were."""


class Network(nn.Module):
    def __init__(self, dropout: bool = False) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5 if dropout else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        PASSED.append(len(x))
        return self.head(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))


def loss(model: nn.Module, batch: Any) -> Tensor:
    """In another unit while training, so that the mode matters."""
    return F.cross_entropy(model(batch[0]), batch[1]) * (2 if model.training else 1)


def accuracy(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float().mean()


def labelled(count: int) -> list[Any]:
    labels = torch.randint(0, 4, (count, SIZE), generator=torch.Generator().manual_seed(1))
    return list(zip(images(count, SIZE, 3, 6, 6), labels, strict=True))


@contextmanager
def scanned(
    model: nn.Module, batches: list[Any], scored: Callable[..., Any] = loss, measured: int | None = None
) -> Iterator[tuple[Session, Evidence]]:
    """A session after the two paths."""
    settings = ScanSettings(device="cpu", batches=measured or len(batches))
    session = Session.open(model, settings, UserFunctions(None, scored, accuracy))
    with session.installed():
        evidence = probe(session, Reader(batches, SIZE, len(batches)), settings, no_progress)
        assert evidence is not None
        yield session, evidence


def levels(
    session: Session, evidence: Evidence, kept: KeptOutputs | None, most: int | None = None
) -> tuple[tuple[Chance, ...], int, int]:
    """The values, the samples that they are of, and those that the model ran for them."""
    PASSED.clear()
    found, samples = chance_levels(session, evidence.counted, evidence.batching, kept, most)
    return found, samples, sum(PASSED)


def flat(found: tuple[Chance, ...]) -> list[float]:
    """Of the loss in both modes, and of the metric where it tells samples apart."""
    modes = [mode for each in found for mode in (each.training, each.inference) if mode is not None]
    assert (found[0].measure, *modes[:2]) == ("loss", found[0].training, found[0].inference)
    return [value for mode in modes for value in (mode.own, mode.other, mode.change.mean)]


@pytest.mark.parametrize("dropout", [False, True])
def test_kept_outputs_say_the_same_as_passes(dropout: bool) -> None:
    """With dropout the path without it is the one whose outputs are given away."""
    with scanned(unsettled(Network(dropout)), labelled(20)) as (session, evidence):
        again, samples, passed = levels(session, evidence, None)
        kept, same, few = levels(session, evidence, evidence.kept_outputs)
    assert samples == same == 20 * SIZE
    assert (passed, few) == (2 * 20 * SIZE, 2 * SIZE)  # a micro-batch on each path sets the mode
    assert len(flat(again)) == 12
    assert flat(kept) == pytest.approx(flat(again), rel=1e-5, abs=1e-7)


def test_what_was_not_kept_runs_after_what_was() -> None:
    """More micro-batches are kept, for remedies, than the paths have run."""
    batches = labelled(20)
    with scanned(unsettled(Network()), batches, measured=12) as (session, evidence):
        assert (evidence.batches, len(evidence.counted), evidence.kept_outputs.micro_batches) == (12, 20, 12)
        again, _, passed = levels(session, evidence, None)
        kept, samples, few = levels(session, evidence, evidence.kept_outputs)
        _, measured, least = levels(session, evidence, evidence.kept_outputs, most=12 * SIZE)
    assert (samples, passed, few) == (20 * SIZE, 2 * 20 * SIZE, 2 * (1 + 20 - 12) * SIZE)
    assert (measured, least) == (12 * SIZE, 2 * SIZE)
    assert flat(kept) == pytest.approx(flat(again), rel=1e-5, abs=1e-7)


def test_outputs_of_micro_batches_that_were_only_scored_are_kept_too() -> None:
    """A scan that few micro-batches decide takes loss and metric of more."""
    settings = ScanSettings(device="cpu")
    session = Session.open(unsettled(Network()), settings, UserFunctions(None, loss, accuracy))
    with session.installed():
        evidence = probe(session, Reader(labelled(64), SIZE, 64), settings, no_progress)
        assert evidence is not None
        assert evidence.batches < evidence.kept_outputs.micro_batches == 64
        again, _, _ = levels(session, evidence, None)
        kept, samples, few = levels(session, evidence, evidence.kept_outputs)
    assert (samples, few) == (64 * SIZE, 2 * SIZE)
    assert flat(kept) == pytest.approx(flat(again), rel=1e-5, abs=1e-7)


def test_other_outputs_are_those_of_a_micro_batch_half_the_list_away() -> None:
    batches = labelled(6)
    model = unsettled(Network())
    with scanned(model, batches) as (session, evidence):
        (found, _), _, _ = levels(session, evidence, evidence.kept_outputs)
    model.eval()
    with torch.no_grad():
        outputs = [model(x).double() for x, _ in batches]
        expected = [
            torch.stack([F.cross_entropy(outputs[(k + away) % 6], y) for k, (_, y) in enumerate(batches)]).mean()
            for away in (0, 3)
        ]
    assert found.inference is not None
    assert [found.inference.own, found.inference.other] == pytest.approx([float(each) for each in expected], rel=1e-5)


def test_only_as_many_micro_batches_are_kept_as_are_given_away() -> None:
    with scanned(unsettled(Network()), labelled(100)) as (session, evidence):
        assert 256 / SIZE <= evidence.kept_outputs.micro_batches < 100
        _, samples, passed = levels(session, evidence, evidence.kept_outputs)
    assert (samples, passed) == (256, 2 * SIZE)


def test_what_a_function_writes_into_outputs_is_not_kept() -> None:
    def careless(model: nn.Module, batch: Any) -> Tensor:
        output = model(batch[0])
        value = F.cross_entropy(output, batch[1])
        output.zero_()
        return value

    with scanned(unsettled(Network()), labelled(20), careless) as (session, evidence):
        again, _, _ = levels(session, evidence, None)
        kept, _, _ = levels(session, evidence, evidence.kept_outputs)
    assert flat(kept) == pytest.approx(flat(again), rel=1e-5, abs=1e-7)


def test_a_model_that_returns_its_own_buffer_does_not_change_what_was_kept() -> None:
    buffers: dict[int, Tensor] = {}

    class Buffer(Network):
        def forward(self, x: Tensor) -> Tensor:
            found = super().forward(x)
            return buffers.setdefault(len(x), found.clone()).copy_(found)

    with scanned(unsettled(Buffer()), labelled(40)) as (session, evidence):
        assert len(evidence.kept_outputs._steps) > 1
        again, _, _ = levels(session, evidence, None)
        kept, _, _ = levels(session, evidence, evidence.kept_outputs)
    assert flat(kept) == pytest.approx(flat(again), rel=1e-5, abs=1e-7)


def keep(kept: KeptOutputs, values: Tensor, size: int = 2) -> None:
    kept.add({"eval": kept.copied({(0,): values}, len(values))}, len(values) // size, size)


def test_a_copy_that_fails_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory is short: the physical batch is then halved, and no micro-batch counts twice."""
    copied, failures = KeptOutputs.copied, iter([False, True])

    def fails(self: KeptOutputs, *given: Any) -> Any:
        if next(failures, False):
            raise torch.OutOfMemoryError("planted")
        return copied(self, *given)

    monkeypatch.setattr(KeptOutputs, "copied", fails)
    with scanned(unsettled(Network()), labelled(32)) as (session, evidence):
        assert next(failures, None) is None
        assert evidence.batches == evidence.kept_outputs.micro_batches == 32
        kept, _, _ = levels(session, evidence, evidence.kept_outputs)
        again, _, _ = levels(session, evidence, None)
    assert flat(kept) == pytest.approx(flat(again), rel=1e-5, abs=1e-7)


def test_nothing_is_kept_of_large_outputs_or_of_a_graph() -> None:
    for values in (torch.zeros(2, 2**21 + 1), torch.zeros(2, 3, requires_grad=True)):
        kept = KeptOutputs()
        keep(kept, torch.zeros(2, 3))
        assert kept.micro_batches == 1
        keep(kept, values)
        keep(kept, torch.zeros(2, 3))
        assert kept.micro_batches == 0
        assert kept.of("eval", 1) == []


def test_part_of_a_physical_batch_is_given_where_no_more_is_wanted() -> None:
    kept, values = KeptOutputs(), torch.arange(12.0).view(6, 2)
    keep(kept, values[:4])
    keep(kept, values[4:])
    (number, size, outputs) = kept.of("eval", 1)[0]
    assert (number, size) == (1, 2)
    assert outputs[0,].tolist() == values[:2].tolist()
    assert [number for number, _, _ in kept.of("eval", 3)] == [2, 1]
    assert [number for number, _, _ in kept.of("eval", 4)] == [2, 1]
    assert kept.of("train", 1) == []


def test_outputs_stay_in_their_process() -> None:
    kept = KeptOutputs()
    keep(kept, torch.zeros(2, 3))
    assert pickle.loads(pickle.dumps(kept)).micro_batches == 0

"""Trials on batches of pairs, of changing sizes, and on models that run no other batches than the loader's."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import bnprobe
from bnprobe.measure.batch import MicroBatch, join
from bnprobe.measure.physical_batch import Batching
from bnprobe.measure.population import population_by_batch, steady_population
from bnprobe.measure.session import UserFunctions, no_progress
from bnprobe.measure.what_if import what_if
from support.networks import Flat, images, unsettled
from support.running import norms, running


class Pairs(Dataset[Any]):
    """Gives ((x1, y1), (x2, y2)): a batch of it has two parts, whatever its size."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        self.x = torch.randn(count, 3, 6, 6, generator=generator)
        self.y = torch.randint(0, 4, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        other = (7 * index + 3) % len(self.x)
        return (self.x[index], self.y[index]), (self.x[other], self.y[other])


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


def apart(model: nn.Module, batch: Any) -> Any:
    (one, _), (other, _) = batch
    return model(one), model(other)


def together(model: nn.Module, batch: Any) -> Any:
    (one, _), (other, _) = batch
    return model(torch.cat([one, other])).chunk(2)


def loss_of(forward: Any) -> Any:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return sum(F.cross_entropy(y, part[1]) for y, part in zip(forward(model, batch), batch, strict=True))

    return loss


def as_one_batch(model: nn.Module, pairs: Pairs, forward: Any) -> nn.Module:
    """All pairs as one batch, torch's own update with momentum 1; two calls of a layer are one population."""
    twin, seen = copy.deepcopy(model).train(), []
    twin.bn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        forward(twin, next(iter(DataLoader(pairs, batch_size=len(pairs)))))
        values = torch.cat(seen).transpose(0, 1).flatten(1)
        twin.bn.running_mean.copy_(values.mean(1))
        twin.bn.running_var.copy_(values.var(1))
    return twin.eval()


@pytest.mark.parametrize("forward", [apart, together])
def test_pairs_are_counted_as_the_loader_counts_them(forward: Any) -> None:
    """Batches of the held-out data are of another size."""
    model, training, evaluation = unsettled(Network()), Pairs(40), Pairs(70)
    report = bnprobe.scan(
        model,
        DataLoader(training, batch_size=4),
        evaluation=DataLoader(evaluation, batch_size=35),
        forward=forward,
        loss=loss_of(forward),
        num_batches=10,
        what_if=True,
    )
    assert [note for note in report.scan.notes if "tried" in note] == []
    found = {remedy.name: remedy for remedy in report.remedies}
    scored = next(iter(DataLoader(evaluation, batch_size=70)))
    with torch.no_grad():
        expected = float(loss_of(forward)(as_one_batch(model, training, forward), scored))
    assert found["recalibrated"].images == 70
    assert found["recalibrated"].after.loss == pytest.approx(expected, rel=1e-4)
    assert found["batch statistics"].detail.startswith("batches of 35 held-out samples")
    assert {"evaluation statistics", "instance statistics"} < found.keys()


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Fixed(Network):
    """Knows its batch size: raises on any other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unflatten(0, (2, 4)).flatten(0, 1))


def labelled(count: int, size: int) -> list[Any]:
    labels = torch.randint(0, 4, (count, size), generator=torch.Generator().manual_seed(1))
    return list(zip(images(count, size, 3, 6, 6), labels, strict=True))


def test_a_model_that_raises_on_other_batches_is_tried_on_its_own() -> None:
    """The statistics are those of the loader's batches, and what cannot be tried is said with the reason."""
    model, batches = unsettled(Fixed()), labelled(6, 8)
    functions = UserFunctions(None, cross_entropy)
    with running(model, batches, 8, functions) as (session, emulation):
        assert not emulation.trusted
        trusted = Batching(8, running_emulation(), 2)  # as if it had raised on some batches only
        counted = [MicroBatch(batch, 8) for batch in batches]
        population, _ = steady_population(session, counted, trusted)
        tried = what_if(session, counted, counted, trusted)
    assert not population.mixed
    seen: list[Tensor] = []
    twin = copy.deepcopy(model).train()
    twin.bn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        for batch, _ in batches:
            twin(batch)
    values = torch.cat(seen).transpose(0, 1).flatten(1)
    torch.testing.assert_close(population.statistics()[0][0], values.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(population.statistics()[0][1], values.var(1), rtol=1e-5, atol=1e-6)
    names = [remedy.name for remedy in tried.remedies]
    assert names == [
        "recalibrated",
        "evaluation statistics",
        "batch statistics",
        "instance statistics",
        "instance renorm",
        "example weighing",
    ]
    (reason,) = tried.untried
    assert reason.startswith(
        '"batch statistics, batches of 32" was not tried. The model raises RuntimeError: unflatten'
    )


def running_emulation() -> Any:
    with running(Network(), labelled(2, 4), 4) as (_, emulation):
        return emulation


class Partly(nn.Module):
    """A layer that sees one row for every three samples, in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Network()
        self.late = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + self.late(y[::3]).mean(0)


def test_where_micro_batches_cannot_run_together_every_trial_runs_them_one_by_one() -> None:
    model, batches = unsettled(Partly()), labelled(6, 8)
    report = bnprobe.scan(model, batches, 8, evaluation=batches, loss=cross_entropy, num_batches=6, what_if=True)
    assert report.scan.stopped == "requested"
    assert not report.scan.emulated
    assert report.scan.emulation.startswith("The layer late receives 6 rows from 16 samples")
    assert report.scan.notes == ()  # no trial was left out
    names = ["recalibrated", "evaluation statistics", "batch statistics"]
    halved = ["instance renorm", "example weighing"]
    whole = ["micro-batch statistics, averaged"]  # pooled ones are the recalibrated ones
    expected = [*((name, 48) for name in names), *((name, 24) for name in halved), *((name, 48) for name in whole)]
    assert [(remedy.name, remedy.images) for remedy in report.remedies] == expected


def test_recalibration_counts_samples_as_the_user_says() -> None:
    """Batches without anything that has one entry per sample: sizes come with them."""
    model, batches = unsettled(Flat()), images(4, 5, 6)
    sizes = [5, 5, 5, 5]
    with running(model, batches, 5) as (session, _):
        settled = population_by_batch(
            session, [MicroBatch(b, n) for b, n in zip(batches, sizes, strict=True)], no_progress
        )
    twin = copy.deepcopy(model).train()
    for norm in norms(twin):
        norm.momentum = 1.0
    with torch.no_grad():
        twin(join(batches))
    mean, _ = settled.statistics[0]
    torch.testing.assert_close(mean.float(), norms(twin)[0].running_mean, rtol=1e-4, atol=1e-5)


class Slow(Network):
    """Takes 20 ms for a forward pass, as if it were large."""

    def forward(self, x: Tensor) -> Tensor:
        started = time.thread_time()
        while time.thread_time() < started + 0.02:
            pass
        return super().forward(x)


def test_trials_of_a_slow_model_are_made_on_fewer_batches() -> None:
    batches = labelled(64, 4)
    counted = [MicroBatch(batch, 4) for batch in batches]
    found = {}
    for model, seconds in ((Slow(), 0.3), (Network(), None)):  # without a limit it does not matter how slow one is
        with running(unsettled(model), batches, 4, UserFunctions(None, cross_entropy)) as (session, emulation):
            found[seconds] = what_if(session, counted, counted, Batching(4, emulation), seconds=seconds)
    images_ = {seconds: tried.remedies[0].images for seconds, tried in found.items()}
    assert images_[None] == 256
    assert 8 * 4 <= images_[0.3] < 20 * 4
    assert found[0.3].samples == 2 * images_[0.3]


def test_of_large_samples_no_more_are_tried_than_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm layer gets 16 positions in 4 channels of each."""
    batches, note = labelled(64, 4), "To save time, remedies were tried on "

    def scanned(measured: int, values: int, **settings: Any) -> tuple[int, list[str]]:
        monkeypatch.setattr("bnprobe.measure.further.PASS_WORK", 4 * values)
        given = {"evaluation": batches, "loss": cross_entropy, "num_batches": measured, **settings}
        report = bnprobe.scan(unsettled(Network()), batches, **given)
        return report.remedies[0].images, [each for each in report.scan.notes if each.startswith(note)]

    left_out = f"{note}96 of the 512 training and held-out samples at hand; thorough=True tries them on all."
    assert scanned(12, 0) == (48, [left_out])
    assert scanned(2, 64 * 48) == (48, [left_out])
    assert scanned(2, 0) == (32, [left_out.replace("96", "64")])  # eight micro-batches
    assert scanned(2, 64 * 256) == scanned(64, 0) == scanned(2, 0, thorough=True) == scanned(2, 0, what_if=True)
    assert scanned(2, 64 * 256) == (256, [])


PASSED: list[int] = []
"""Samples of every forward pass; not in the model, whose attributes come back as they were."""


class Counting(Network):
    def forward(self, x: Tensor) -> Tensor:
        PASSED.append(len(x))
        return super().forward(x)


@pytest.mark.parametrize("held_out", [True, False])
def test_what_the_scan_has_scored_is_not_scored_again(held_out: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model as loaded, on held-out data, or without any on training data: the same figures without a pass."""
    model, batches = unsettled(Counting()), labelled(32, 4)
    evaluation = batches[16:] if held_out else None
    reports, passed = [], []
    for known in (True, False):
        if not known:
            monkeypatch.setattr("bnprobe.measure.further._as_loaded", lambda *_: None)
        PASSED.clear()
        given = {"evaluation": evaluation, "loss": cross_entropy, "num_batches": 16, "thorough": True}
        reports.append(bnprobe.scan(model, batches[:16], **given))
        passed.append(sum(PASSED))
    assert passed[1] - passed[0] == (64 if held_out else 16)
    assert reports[0].remedies
    for one, other in zip(*(report.remedies for report in reports), strict=True):
        assert one.before.loss == pytest.approx(other.before.loss, rel=1e-6)
        assert one.after == other.after
        assert one.loss_change.mean == pytest.approx(other.loss_change.mean, abs=1e-6)
        assert one.loss_change.interval == pytest.approx(other.loss_change.interval, abs=1e-5)


def test_only_where_passes_are_dear_a_note_says_what_was_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unsettled(Network()).eval()
    batches = [(x, model(x).argmax(1)) for x, _ in labelled(64, 4)]  # whatever is done makes it worse
    start = "To save time, remedies that were worse on a part of the samples were scored on no more; thorough=True"
    for work, settings in ((0, {}), (2**29, {}), (0, {"thorough": True}), (0, {"what_if": True})):
        monkeypatch.setattr("bnprobe.measure.further.PASS_WORK", work)
        report = bnprobe.scan(model, batches, evaluation=batches, loss=cross_entropy, num_batches=64, **settings)
        short = [remedy.name for remedy in report.remedies if remedy.cut_short]
        noted = [note for note in report.scan.notes if note.startswith(start)]
        assert bool(short) == bool(noted) == (work == 0 and not settings)


def test_a_single_batch_that_cannot_be_divided_gives_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its statistics have no other part, also where passes are dear; the scan goes on."""
    monkeypatch.setattr("bnprobe.measure.further.PASS_WORK", 0)
    model, batches = unsettled(Network()), labelled(4, 64)
    model.bn.running_var *= 1e-4
    given = {"evaluation": batches[:1], "loss": cross_entropy, "num_batches": 4, "emulate": False}
    found = {remedy.name: remedy for remedy in bnprobe.scan(model, batches, **given).remedies}
    assert found["evaluation statistics"].loss_change.mean < 0
    assert found["evaluation statistics"].loss_change.interval is None
    assert found["recalibrated"].loss_change.interval is not None

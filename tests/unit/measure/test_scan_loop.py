"""How many micro-batches are measured, and what is said about those that are not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnprobe.commands.scan import scan
from bnprobe.errors import DataError
from bnprobe.records import Report
from bnprobe.stats.theory import mismatch_iid
from support.networks import Flat, Residual, images, unsettled


def settled(n: int) -> nn.Module:
    """A layer whose running statistics are exact for standard-normal data."""
    return nn.BatchNorm1d(n)


def endless(size: int, features: int, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(size, features, generator=generator)


@pytest.mark.parametrize("batches", [1, 2, 5, 37])
@pytest.mark.parametrize("emulate", [True, False])
def test_exactly_as_many_as_asked_for(batches: int, emulate: bool) -> None:
    report = scan(unsettled(Flat()), endless(4, 6), 4, num_batches=batches, emulate=emulate)
    described = report.scan
    assert (described.batches, described.batches_requested, described.images) == (batches, batches, 4 * batches)
    assert (described.stopped, described.partial, described.left_out) == ("requested", False, 0)
    assert sum(report.layers[0].train.r.histogram.counts) == 8 * batches
    assert sum(report.layers[0].eval.r.histogram.counts) == 8 * batches


def test_no_batch_more_is_drawn_than_asked_for() -> None:
    drawn: list[int] = []

    def counting() -> Iterator[Tensor]:
        for index, batch in enumerate(endless(4, 6)):
            drawn.append(index)
            yield batch

    scan(unsettled(Flat()), counting(), 4, num_batches=37)
    assert len(drawn) == 37


@pytest.mark.parametrize("there", [2, 3, 20])
def test_data_that_ends_early(there: int) -> None:
    report = scan(unsettled(Flat()), images(there, 4, 6), 4, num_batches=40)
    assert (report.scan.stopped, report.scan.batches, report.scan.batches_requested) == ("data_exhausted", there, 40)


def test_a_single_batch_leaves_everything_undecided() -> None:
    report = scan(unsettled(Flat()), images(1, 4, 6), 4)
    assert (report.scan.stopped, report.scan.batches) == ("data_exhausted", 1)
    for layer in report.layers:
        assert layer.train.interval == layer.eval.interval == (0.0, None)
        assert layer.train.equivalent_batch_size_interval == (1.0, None)
        assert (layer.flagged, layer.undecided) == (False, True)
    assert report.summary.undecided == 2


def test_clear_cases_are_decided_at_the_first_look() -> None:
    report = scan(unsettled(Flat()), endless(2, 6), 2)
    assert (report.scan.stopped, report.scan.batches) == ("decided", 16)
    assert all(layer.flagged for layer in report.layers)
    clean = scan(settled(6), endless(256, 6), 256)
    assert (clean.scan.stopped, clean.scan.batches) == ("decided", 16)
    assert (clean.summary.flagged, clean.summary.undecided) == (0, 0)


def test_a_layer_on_the_threshold_draws_up_to_the_budget() -> None:
    report = scan(settled(6), endless(31, 6), 31, max_batches=50, thresholds={"*": 31.0})
    assert (report.scan.stopped, report.scan.batches, report.scan.batches_requested) == ("max_batches", 50, None)
    assert report.layers[0].undecided
    low, high = report.layers[0].eval.interval
    assert low < mismatch_iid(31) < high


def test_noise_alone_has_its_own_limit_when_a_scan_stops() -> None:
    """On the limit of noise a scan goes on; on the threshold, which is far below that limit, it need not."""
    on_limit = scan(settled(6), endless(14, 6), 14, max_batches=50)
    assert (on_limit.scan.stopped, on_limit.scan.batches) == ("max_batches", 50)
    assert on_limit.layers[0].undecided
    below = scan(settled(6), endless(32, 6), 32, max_batches=50)
    assert (below.scan.stopped, below.scan.batches) == ("decided", 16)
    assert not below.layers[0].flagged


def test_wrong_statistics_have_the_threshold_as_their_limit_when_a_scan_stops() -> None:
    layer = settled(6)
    layer.running_mean.fill_(0.2035)  # with the noise of 256 values, D is that of 32
    report = scan(layer, endless(256, 6), 256, max_batches=50)
    assert (report.scan.stopped, report.scan.batches) == ("max_batches", 50)
    assert report.layers[0].undecided


class OneInTraining(nn.Module):
    """Its second layer runs in training only, on the same data."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.auxiliary = settled(6), settled(6)

    def forward(self, x: Tensor) -> Any:
        return (self.main(x), self.auxiliary(x)) if self.training else self.main(x)


def test_a_layer_that_runs_in_training_only_has_the_limit_of_noise_when_a_scan_stops() -> None:
    report = scan(OneInTraining(), endless(32, 6), 32, max_batches=50)
    assert [layer.only_in for layer in report.layers] == [None, "train"]
    assert (report.scan.stopped, report.scan.batches) == ("decided", 16)
    assert not any(layer.flagged or layer.undecided for layer in report.layers)


class HalfFrozen(Flat):
    """Its own train() keeps the first layer in eval mode: training and inference normalize alike."""

    def train(self, mode: bool = True) -> HalfFrozen:
        super().train(mode)
        next(module for module in self.modules() if isinstance(module, nn.BatchNorm1d)).eval()
        return self


def test_a_layer_that_cannot_be_flagged_does_not_keep_a_scan_going() -> None:
    report = scan(unsettled(HalfFrozen()), endless(2, 6), 2)
    assert (report.scan.stopped, report.scan.batches) == ("decided", 16)


def test_a_layer_near_the_threshold_draws_until_it_is_decided() -> None:
    report = scan(settled(6), endless(28, 6), 28, max_batches=4096, thresholds={"*": 31.0})
    assert report.scan.stopped == "decided"
    assert report.scan.batches in {32, 64, 128, 256, 512, 1024}
    assert report.layers[0].flagged


@pytest.mark.parametrize("emulate", [True, False])
def test_a_partial_last_batch_is_left_out_and_counted(emulate: bool) -> None:
    model, data = unsettled(Flat()), [*images(5, 4, 6), torch.randn(3, 6)]
    report = scan(model, data, 4, num_batches=10, emulate=emulate)
    assert (report.scan.batches, report.scan.left_out, report.scan.stopped) == (5, 3, "data_exhausted")
    assert report.layers == scan(model, data[:5], 4, num_batches=5, emulate=emulate).layers


@pytest.mark.parametrize("sizes", [[4, 4, 8, 4], [4, 3, 4, 5], [4, 2, 2], [4, 4, 4, 4, 4, 9, 3]], ids=str)
def test_batches_of_several_sizes_run_one_by_one_as_they_are(sizes: list[int]) -> None:
    data, model = [torch.randn(size, 6, dtype=torch.float64) for size in sizes], unsettled(nn.BatchNorm1d(6)).double()
    report = scan(model, data, 4, num_batches=len(sizes))
    assert (report.scan.batches, report.scan.images, report.scan.left_out) == (len(sizes), sum(sizes), 0)
    assert report.scan.size_range == (min(sizes), max(sizes))
    assert report.scan.batch_size == round(sum(sizes) / len(sizes))
    assert not any(layer.composition for layer in report.layers)
    expected = [mismatch_of(batch, model) for batch in data]
    for path in (report.layers[0].train, report.layers[0].eval):
        assert path is not None
        assert path.mismatch == pytest.approx(sum(expected) / len(expected), rel=1e-9)


def mismatch_of(batch: torch.Tensor, norm: Any) -> float:
    """D of one micro-batch of rows, by its definition."""
    mean, variance = batch.mean(0), batch.var(0, unbiased=False)
    by_batch = (batch - mean) / (variance + norm.eps).sqrt()
    by_running = (batch - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    return float((by_batch - by_running).square().mean())


@pytest.mark.parametrize("size", [8, 3])
def test_a_list_of_batches_of_another_size_than_asked_for(size: int) -> None:
    data = [torch.randn(size, 6)] * 3
    with pytest.raises(DataError, match=f"The first batch of the data given has {size} samples, not 4"):
        scan(unsettled(Flat()), data, 4)
    assert scan(unsettled(Flat()), data).scan.batch_size == size  # as the message says


def test_an_iterator_of_another_size_than_asked_for_is_measured_as_it_is() -> None:
    report = scan(unsettled(Flat()), iter([torch.randn(3, 6) for _ in range(6)]), 4)
    assert (report.scan.batch_size, report.scan.size_range, report.scan.images) == (3, None, 18)
    assert "The batches have 3 samples, not 4 as asked for" in " ".join(report.scan.notes)


@pytest.mark.parametrize("data", [[], iter([]), (x for x in ())], ids=["list", "iterator", "generator"])
def test_no_batch_at_all(data: Any) -> None:
    with pytest.raises(DataError, match="empty"):
        scan(unsettled(Flat()), data, 4)


def test_an_infinite_loader_of_equal_batches_ends() -> None:
    report = scan(unsettled(Flat()), itertools.repeat(torch.randn(4, 6)), 4)
    assert report.scan.stopped in {"decided", "max_batches"}


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    scan(unsettled(Flat()), endless(4, 6), 4, num_batches=40, physical_batch=40, progress=lambda *at: told.append(at))
    assert told == [(0, 40), (10, 40), (20, 40), (30, 40), (40, 40)]


# ---- reproducible


def without_time(report: Report) -> Report:
    passes = tuple(replace(extra, seconds=0.0) for extra in report.scan.passes)
    return replace(report, scan=replace(report.scan, seconds=0.0, passes=passes))


class Noisy(Residual):
    """Dropout, so that the train path draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.3, self.training))


@pytest.mark.parametrize("emulate", [True, False])
def test_the_same_seed_gives_the_same_report(emulate: bool) -> None:
    model = unsettled(Noisy())
    data = TensorDataset(torch.randn(50, 3, 5, 5), torch.randint(0, 3, (50,)))

    def run(seed: int) -> Report:
        loader = DataLoader(data, batch_size=8, shuffle=True)
        return without_time(scan(model, loader, 2, num_batches=20, seed=seed, emulate=emulate))

    first = run(5)
    torch.rand(7)  # what was drawn before does not matter
    assert run(5) == first
    assert run(6).layers != first.layers


# ---- every batch size from one pass


@pytest.mark.parametrize("physical", [None, 4, 6])
def test_all_batch_sizes_on_the_eval_path(physical: int | None) -> None:
    """Also where a physical batch holds fewer images than the largest size."""
    model = unsettled(Residual())
    data = TensorDataset(torch.randn(56, 3, 5, 5))
    sizes = (1, 2, 4, 8)
    together = scan(model, DataLoader(data), 2, num_batches=28, batch_sizes=sizes, physical_batch=physical)
    assert together.scan.physical_batch == (physical or 32)
    for size in sizes:
        alone = scan(model, DataLoader(data), size, num_batches=56 // size)
        for layer, expected in zip(together.layers, alone.layers, strict=True):
            (point,) = [point for point in layer.batch_sizes if point.batch_size == size]
            assert point.batches == 56 // size
            assert point.mismatch == pytest.approx(expected.eval.mismatch, rel=1e-4)
            assert point.interval == pytest.approx(expected.eval.interval, rel=1e-3)
            assert point.equivalent_batch_size == pytest.approx(expected.eval.equivalent_batch_size, rel=1e-3)


def test_the_largest_size_gets_enough_batches_before_the_scan_stops() -> None:
    report = scan(unsettled(Flat()), endless(2, 6), 2, batch_sizes=(1, 16))
    assert report.scan.stopped == "decided"
    assert report.layers[0].batch_sizes[-1].batches >= 8


def test_figures_of_other_sizes_do_not_mix_in_what_ran_for_real() -> None:
    """Data that turns out in mid-scan to be impossible to join: later micro-batches say nothing of other sizes."""
    data = [*images(16, 2, 3, 5, 5), *(torch.randn(2, 3, side, side) for side in (6, 7) * 4)]
    model = unsettled(Residual())
    report = scan(model, data, 2, num_batches=24, batch_sizes=(1, 4), physical_batch=16)
    assert report.scan.batches == 24
    expected = scan(model, [torch.cat(data[i : i + 2]) for i in range(0, 16, 2)], 4, num_batches=8)
    for layer, other in zip(report.layers, expected.layers, strict=True):
        assert [point.batch_size for point in layer.batch_sizes] == [1, 4]
        assert layer.batch_sizes[1].batches == 8
        assert layer.batch_sizes[1].mismatch == pytest.approx(other.eval.mismatch, rel=1e-4)

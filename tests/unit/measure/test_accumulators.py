"""Sums over micro-batches: the same in one go and in pieces."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bnprobe.distributed import Share
from bnprobe.measure.accumulators import (
    STATISTICS,
    CorrectionD,
    CorrectionR,
    LayerMismatch,
    Mismatch,
    MismatchSums,
    SamplePool,
)
from bnprobe.measure.forward_pass import Recorded, Slot
from bnprobe.measure.layers import ProbedLayer, find_layers
from bnprobe.measure.path_evidence import PathEvidence
from bnprobe.measure.statistic import Statistic, Step
from bnprobe.stats.moments import corrections, pool_moments

KINDS = (Mismatch, LayerMismatch, CorrectionR, CorrectionD, MismatchSums)


def layers(*channels: int) -> tuple[ProbedLayer, ...]:
    model = nn.Sequential(*(nn.BatchNorm1d(count, eps=0.01 * (1 + count)) for count in channels))
    return find_layers(model, lambda name: True).layers


def statistics(batches: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(batches, columns, generator=generator, dtype=torch.float64)
    return mean, torch.rand(batches, columns, generator=generator, dtype=torch.float64) * 9


def record(mean: Tensor, variance: Tensor, unit: int) -> Recorded:
    return Recorded(mean, variance, unit, values=8, by_batch=False, bytes=0)


def new(size: int = 4, **options: object) -> PathEvidence:
    return PathEvidence("eval", size, **options)


def add(
    path: PathEvidence, of: tuple[ProbedLayer, ...], slots: tuple[Slot, ...], mean: Tensor, variance: Tensor
) -> PathEvidence:
    """Add micro-batches whose columns are the channels of ``slots``, side by side."""
    sizes = [of[index].info.channels for index, _ in slots]
    parts = zip(slots, mean.split(sizes, 1), variance.split(sizes, 1), strict=True)
    path.add({slot: record(means, variances, unit=path.batch_size) for slot, means, variances in parts}, of)
    return path


def assert_same(found: PathEvidence, expected: PathEvidence) -> None:
    assert found.batches == expected.batches
    assert found.calls == expected.calls
    for kind in KINDS:
        for name in found[kind].states:
            torch.testing.assert_close(found[kind][name], expected[kind][name], rtol=1e-12, atol=1e-12)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 999))
def test_in_pieces_as_in_one_go(pieces: list[int], seed: int) -> None:
    both, slots = layers(3, 2), ((0, 0), (1, 0), (1, 1))
    mean, variance = statistics(sum(pieces), 7, seed)
    whole, parts = new(), new()
    add(whole, both, slots, mean, variance)
    for means, variances in zip(mean.split(pieces), variance.split(pieces), strict=True):
        add(parts, both, slots, means, variances)
    assert whole.batches == sum(pieces)
    assert_same(parts, whole)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 999))
def test_two_processes_as_one(first: int, second: int, seed: int) -> None:
    """Each adds its own calls to those of the other, and its own micro-batches to the replicates that are theirs."""
    both, slots = layers(3, 2), ((0, 0), (1, 0), (1, 1))
    mean, variance = statistics(first + second, 7, seed)
    whole = add(new(), both, slots, mean, variance)
    shares = [Share(rank, 2) for rank in range(2)]
    mine = [[row for row in range(first + second) if share.owns(row)] for share in shares]
    one, other = (
        add(new(share=share), both, slots, mean[rows], variance[rows]) for share, rows in zip(shares, mine, strict=True)
    )
    merged = one.on_host()
    merged.merge(other.on_host())
    assert_same(merged, whole)


def test_merging_takes_over_calls_that_only_one_process_saw() -> None:
    both = layers(3, 2)
    mean, variance = statistics(6, 5)
    one, other = new(), new()
    add(one, both, ((0, 0),), mean[:2, :3], variance[:2, :3])
    add(other, both, ((1, 0), (0, 0)), mean[2:, [3, 4, 0, 1, 2]], variance[2:, [3, 4, 0, 1, 2]])
    one.merge(other)
    assert one.calls == ((0, 0), (1, 0))
    alone = add(new(), both, ((1, 0),), mean[2:, 3:], variance[2:, 3:])
    assert one.mismatch((1, 0)) == pytest.approx(alone.mismatch((1, 0)))
    torch.testing.assert_close(asdict(one.moments([(1, 0)])), asdict(alone.moments([(1, 0)])), rtol=1e-12, atol=1e-12)
    assert one.moments([(0, 0)]).counts.sum() == 6
    empty = new()
    empty.merge(one)
    assert_same(empty, one)


def test_every_slot_has_its_own_channels() -> None:
    both, slots = layers(3, 2), ((0, 0), (1, 0), (1, 1))
    mean, variance = statistics(5, 7)
    path = add(new(), both, slots, mean, variance)
    found = []
    for slot, columns in zip(slots, (slice(0, 3), slice(3, 5), slice(5, 7)), strict=True):
        info = both[slot[0]].info
        eps = torch.full((info.channels,), info.eps, dtype=torch.float64)
        zeros, ones = torch.zeros_like(eps), torch.ones_like(eps)
        values = corrections(mean[:, columns], variance[:, columns], zeros, ones, eps)
        found.append(values.mismatch.mean(1))
        sums, r, d = path.mismatch(slot), path.r([slot]), path.d([slot])
        assert sums.total == pytest.approx(float(found[-1].sum()))
        assert sums.square == pytest.approx(float(found[-1].square().sum()))
        assert r.high == pytest.approx(float(values.r.max()))
        assert d.low == pytest.approx(float(values.d.min()))
        assert r.clipped == int(((values.r > 3) | (values.r < 1 / 3)).sum())
        assert r.count == values.r.numel()
    # The calls of one micro-batch are averaged before they are squared.
    layer = path.layer(1)
    assert layer is not None
    assert layer == path.layer_sums()[1]
    assert layer.total == pytest.approx(float((found[1] + found[2]).sum() / 2))
    assert layer.square == pytest.approx(float(((found[1] + found[2]) / 2).square().sum()))
    # Of r and d, calls are taken together value by value.
    apart = [path.d([slot]) for slot in slots[1:]]
    together = path.d(list(slots[1:]))
    assert together.low == min(one.low for one in apart)
    assert together.total == pytest.approx(sum(one.total for one in apart))
    np.testing.assert_array_equal(together.histogram, sum(one.histogram for one in apart))


@given(st.integers(1, 4), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 999))
def test_images_left_over_wait_for_the_next_step(size: int, steps: list[int], seed: int) -> None:
    (layer,) = layers(2)
    mean, variance = statistics(sum(steps), 2, seed)
    path = PathEvidence("other sizes", size)
    for means, variances in zip(mean.split(steps), variance.split(steps), strict=True):
        path.add({(0, 0): record(means, variances, unit=1)}, (layer,))
    whole = sum(steps) // size * size
    assert path.batches == whole // size
    if not whole:
        return
    expected = add(new(size), (layer,), ((0, 0),), *pool_moments(mean[:whole], variance[:whole], size))
    assert path.layer_sums()[0].count == whole // size
    assert path.layer_sums()[0].total == pytest.approx(expected.mismatch((0, 0)).total, rel=1e-12)
    assert path.layer_sums()[0].square == pytest.approx(expected.mismatch((0, 0)).square, rel=1e-12)


def test_every_sample_has_the_same_chance_to_stay_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 of 32 samples, of micro-batches of 4; the number of pools that hold a sample is binomial."""
    monkeypatch.setattr("bnprobe.measure.accumulators.POOL_SAMPLES", 8)
    (layer,) = layers(1)
    mean, variance = statistics(32, 1)
    pools, held = 80, np.zeros(32, dtype=int)
    for seed in range(pools):
        path = new(seed=seed)
        for means, variances in zip(mean.split(16), variance.split(16), strict=True):
            path.add({(0, 0): record(means, variances, unit=1)}, (layer,))
        numbers = path[SamplePool].number
        assert len(set(numbers)) == 8
        held[numbers] += 1
    expected, deviation = pools / 4, (pools * 1 / 4 * 3 / 4) ** 0.5
    assert np.abs(held - expected).max() < 4 * deviation


def test_steps_that_make_other_calls_are_merged() -> None:
    both = layers(3, 2)
    mean, variance = statistics(6, 5)
    path = new()
    first, second = record(mean[:4, :3], variance[:4, :3], 4), record(mean[:4, 3:], variance[:4, 3:], 4)
    path.add({(0, 0): first, (1, 0): second}, both)
    path.add({(0, 0): record(mean[4:, :3], variance[4:, :3], 4)}, both)
    path.add({}, both)
    assert {slot: path.mismatch(slot).count for slot in path.calls} == {(0, 0): 6, (1, 0): 4}
    assert {index: sums.count for index, sums in path.layer_sums().items()} == {0: 6, 1: 4}
    alone = new()
    alone.add({(0, 0): record(mean[:, :3], variance[:, :3], 4)}, both)
    assert path.mismatch((0, 0)).total == pytest.approx(alone.mismatch((0, 0)).total, rel=1e-12)
    merged, expected = path.r([(0, 0)]), alone.r([(0, 0)])
    np.testing.assert_array_equal(merged.histogram, expected.histogram)
    assert (merged.low, merged.high, merged.clipped) == (expected.low, expected.high, expected.clipped)
    torch.testing.assert_close(path.moments([(0, 0)]).whole().rho_r, alone.moments([(0, 0)]).whole().rho_r)


def test_the_step_of_the_first_bad_value_is_kept() -> None:
    both = layers(1, 1)
    path, slots = new(), ((0, 0), (1, 0))
    good, bad = torch.ones(1, 2).double(), torch.tensor([[1.0, float("nan")]]).double()
    for mean in (good, bad, bad):
        add(path, both, slots, mean, good)
    assert [path.first_bad(slot) for slot in slots] == [None, 1]
    assert path.first_bad((0, 1)) is None


def test_groups_of_a_micro_batch_count_as_one_micro_batch() -> None:
    """A ghost layer of two groups beside a plain one: D is the mean over its groups, r and d are the groups' own."""
    both = layers(2, 2)
    mean, variance = statistics(6, 2)
    plain, other = statistics(3, 2, 1)
    path = new()
    ghost = Recorded(mean, variance, 4, values=4, by_batch=True, bytes=0, groups=2)
    path.add({(0, 0): ghost, (1, 0): record(plain, other, 4)}, both)
    alone = add(new(), both, ((0, 0),), mean, variance)
    assert (path.batches, path.mismatch((0, 0)).count, path.mismatch((1, 0)).count) == (3, 3, 3)
    assert path.mismatch((0, 0)).total == pytest.approx(alone.mismatch((0, 0)).total / 2, rel=1e-12)
    assert path.r([(0, 0)]).count == 12
    assert path.moments([(0, 0)]).counts.sum() == 6
    beside = add(new(), both, ((1, 0),), plain, other)
    assert path.mismatch((1, 0)) == pytest.approx(beside.mismatch((1, 0)))


def held(path: PathEvidence) -> int:
    return sum(path[kind][name].numel() for kind in KINDS for name in path[kind].states)


def test_memory_does_not_grow_with_the_number_of_micro_batches() -> None:
    (layer,) = layers(2)
    path = add(new(), (layer,), ((0, 0),), *statistics(2, 2))
    before = held(path)
    add(path, (layer,), ((0, 0),), *statistics(1000, 2))
    assert held(path) == before


@pytest.mark.parametrize("chunk", [1, 50, 2**19])
def test_steps_wait_for_each_other_as_long_as_they_are_small(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is bounded, beside the last step, and a look in between changes nothing."""
    monkeypatch.setattr("bnprobe.measure.path_evidence._CHUNK_VALUES", chunk)
    monkeypatch.setattr("bnprobe.measure.path_evidence._WAITING_VALUES", chunk // 2)
    both, slots = layers(3, 2), ((0, 0), (1, 0), (1, 1))
    mean, variance = statistics(40, 7)
    whole, parts, looked_at = add(new(), both, slots, mean, variance), new(), new()
    for number, (means, variances) in enumerate(zip(mean.split(2), variance.split(2), strict=True)):
        add(parts, both, slots, means, variances)
        add(looked_at, both, slots, means, variances)
        held = sum(means.numel() for waiting in parts._waiting.values() for means, _ in waiting.moments)
        assert held <= chunk // 2 + means.numel()
        if number % 3 == 0:
            assert looked_at.mismatch(slots[2]).count == looked_at.batches == 2 * (number + 1)
    assert_same(parts, whole)
    assert_same(looked_at, whole)


def test_micro_batches_whose_samples_are_not_told_apart_count_where_samples_are_counted() -> None:
    """On held-out data that runs in real micro-batches."""
    (layer,) = layers(2)
    mean, variance = statistics(4, 2)
    path = PathEvidence("held-out", 1)
    path.add({(0, 0): record(mean, variance, unit=3)}, (layer,))
    assert path.batches == path.mismatch((0, 0)).count == 4


@pytest.mark.parametrize("size", [2, 3])
def test_images_left_over_stay_while_the_sizes_of_inputs_change(size: int) -> None:
    (layer,) = layers(2)
    mean, variance = statistics(10, 2)
    path = PathEvidence("other sizes", size)
    for values, means, variances in zip((8, 4, 4, 8, 8), mean.split(2), variance.split(2), strict=True):
        path.add({(0, 0): replace(record(means, variances, unit=1), values=values)}, (layer,))
    whole = 10 // size * size
    expected = add(new(size), (layer,), ((0, 0),), *pool_moments(mean[:whole], variance[:whole], size))
    assert path.batches == path.mismatch((0, 0)).count == 10 // size
    assert path.mismatch((0, 0)).total == pytest.approx(expected.mismatch((0, 0)).total, rel=1e-12)


def test_memory_does_not_grow_with_the_ways_in_which_layers_are_called() -> None:
    several = layers(2, 2, 2, 2)
    path = add(new(), several, tuple((index, 0) for index in range(4)), *statistics(3, 8))
    before = held(path)
    for called in range(1, 15):
        slots = tuple((index, 0) for index in range(4) if called >> index & 1)
        add(path, several, slots, *statistics(3, 2 * len(slots), called))
    assert held(path) == before
    assert [path.mismatch((index, 0)).count for index in range(4)] == [24] * 4


def test_a_call_that_first_comes_later_finds_room() -> None:
    both = layers(3, 2)
    mean, variance = statistics(6, 5)
    path = new()
    add(path, both, ((0, 0),), mean[:2, :3], variance[:2, :3])
    add(path, both, ((1, 0), (0, 0)), mean[2:, [3, 4, 0, 1, 2]], variance[2:, [3, 4, 0, 1, 2]])
    whole = add(new(), both, ((0, 0), (1, 0)), mean, variance)
    assert path.mismatch((0, 0)).total == pytest.approx(whole.mismatch((0, 0)).total, rel=1e-12)
    np.testing.assert_array_equal(path.d([(0, 0)]).histogram, whole.d([(0, 0)]).histogram)
    assert path.mismatch((1, 0)).count == 4
    torch.testing.assert_close(asdict(path.moments([(0, 0)])), asdict(whole.moments([(0, 0)])), rtol=1e-12, atol=1e-12)


def test_calls_that_wait_while_another_is_first_seen() -> None:
    """Of two kinds, one of which divides micro-batches into groups: each waits by itself."""
    both, (mean, variance) = layers(3, 2), statistics(12, 5)
    path, whole = new(), new()

    def step(rows: slice, *, two: bool) -> dict[Slot, Recorded]:
        plain = record(mean[rows, :3], variance[rows, :3], unit=4)
        halves = record(mean[rows, 3:].repeat_interleave(2, 0), variance[rows, 3:].repeat_interleave(2, 0), unit=4)
        return {(0, 0): plain} | ({(1, 0): replace(halves, groups=2)} if two else {})

    for start in range(0, 12, 2):
        path.add(step(slice(start, start + 2), two=start >= 4), both)
    whole.add(step(slice(0, 4), two=False), both)
    whole.add(step(slice(4, 12), two=True), both)
    assert (path.mismatch((0, 0)).count, path.mismatch((1, 0)).count) == (12, 8)
    assert_same(path, whole)


def test_steps_that_call_their_layers_in_another_order() -> None:
    both, (mean, variance) = layers(3, 2), statistics(6, 5)
    path, slots = add(new(), both, ((0, 0), (1, 0)), mean[:2], variance[:2]), ((1, 0), (0, 0))
    for rows in (slice(2, 4), slice(4, 6)):
        add(path, both, slots, mean[rows][:, [3, 4, 0, 1, 2]], variance[rows][:, [3, 4, 0, 1, 2]])
    assert_same(path, add(new(), both, ((0, 0), (1, 0)), mean, variance))


def test_the_pool_knows_its_calls_in_any_order() -> None:
    both, (mean, variance), path = layers(3, 2), statistics(12, 5), new()

    def samples(rows: slice, *indices: int) -> dict[Slot, Recorded]:
        columns = (slice(0, 3), slice(3, 5))
        return {(index, 0): record(mean[rows, columns[index]], variance[rows, columns[index]], 1) for index in indices}

    path.add(samples(slice(0, 4), 0, 1), both)
    path.add(samples(slice(4, 8), 0), both)  # is no sample of both
    path.add(samples(slice(8, 12), 1, 0), both)
    pooled = path.pool((((0, 0), (1, 0)),))
    d = torch.cat([pooled.mean, path[SamplePool].origins([(0, 0), (1, 0)])[None]])
    eps = torch.cat([layer.info.eps_of_channels for layer in both])
    expected = torch.cat([mean[:4], mean[8:]]) / (1 + eps) ** 0.5
    torch.testing.assert_close(d[:-1].double() + d[-1:], expected, rtol=1e-5, atol=1e-6)


def test_samples_are_told_from_micro_batches_of_as_many_rows() -> None:
    """On held-out data, where a micro-batch counts as one: samples ran together at first, then real micro-batches."""
    (layer,) = layers(2)
    mean, variance = statistics(4, 2)
    path, samples = PathEvidence("held-out", 1), PathEvidence("held-out", 1)
    for rows, unit in ((slice(0, 2), 1), (slice(2, 4), 3)):
        path.add({(0, 0): record(mean[rows], variance[rows], unit=unit)}, (layer,))
    samples.add({(0, 0): record(mean[:2], variance[:2], unit=1)}, (layer,))
    assert path.mismatch((0, 0)).count == 4
    assert path.sample_squares(((0, 0),)).equal(samples.sample_squares(((0, 0),)))
    assert path[LayerMismatch]["powers of parts"].equal(samples[LayerMismatch]["powers of parts"])


def test_calls_that_a_step_leaves_out_go_on_with_the_numbers_of_their_micro_batches() -> None:
    both, (mean, variance) = layers(3, 2), statistics(6, 5)

    def step(rows: slice, *, plain: bool) -> dict[Slot, Recorded]:
        halves = record(mean[rows, 3:].repeat_interleave(2, 0), variance[rows, 3:].repeat_interleave(2, 0), unit=4)
        found = {(0, 0): record(mean[rows, :3], variance[rows, :3], unit=4)} if plain else {}
        return {**found, (1, 0): replace(halves, groups=2)}

    path = new()
    for start, plain in ((0, True), (2, False), (4, True)):
        path.add(step(slice(start, start + 2), plain=plain), both)
    counts = path.moments(((0, 0),)).counts[:, 0].tolist()
    assert counts == [1, 1, 0, 0, 1, 1, *[0] * 10]  # of the replicates that the micro-batches of each step belong to


class LargestMean(Statistic):
    """From outside the package: the largest batch mean, in running standard deviations, and its channel."""

    name = "largest mean"

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.declare("of channel", "max", per="channel")
        self.declare("batches", "sum")

    def update(self, step: Step) -> None:
        d = step.values.d.amax(0)
        self.accumulate("of channel", step.columns.channel, d)
        self.accumulate("batches", step.columns.call, torch.full_like(step.columns.call, step.values.d.shape[0]))

    def compute(self, states: dict[str, Tensor]) -> dict[str, float]:
        largest, channel = states["of channel"].max(0)
        return {"value": float(largest), "channel": int(channel), "batches": float(states["batches"])}


def test_a_statistic_from_outside_is_updated_merged_and_computed() -> None:
    both, slots = layers(3, 2), ((0, 0), (1, 0), (1, 1))
    mean, variance = statistics(8, 7)
    with STATISTICS.including(LargestMean):
        halves = [add(new(), both, slots, mean[rows], variance[rows]) for rows in (slice(0, 5), slice(5, 8))]
        merged = halves[0].on_host()
        merged.merge(halves[1].on_host())
    for index, own in ((0, slots[:1]), (1, slots[1:])):
        columns = [mean[:, :3]] if index == 0 else [mean[:, 3:5], mean[:, 5:]]
        deviation = (1 + both[index].info.eps) ** 0.5
        largest = torch.stack([part.amax(0) for part in columns]).amax(0) / deviation
        assert merged.reported(list(own))["largest mean"] == {
            "value": pytest.approx(float(largest.max())),
            "channel": int(largest.argmax()),
            "batches": 8.0 * len(own),
        }
    assert "largest mean" not in add(new(), both, slots, mean, variance).reported([slots[0]])

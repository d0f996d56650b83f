"""Sums over micro-batches: the same in one go and in pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bnprobe.probing.accumulators import Path
from bnprobe.probing.evidence import layer_sums, path_evidence
from bnprobe.probing.hooks import Recorded, Slot
from bnprobe.probing.layers import ProbedLayer, find_layers
from bnprobe.stats.mismatch import corrections
from bnprobe.stats.moments import pool_moments

CPU = torch.device("cpu")


def layers(*channels: int) -> tuple[ProbedLayer, ...]:
    model = nn.Sequential(*(nn.BatchNorm1d(count, eps=0.01 * (1 + count)) for count in channels))
    return find_layers(model, lambda name: True).layers


def statistics(batches: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(batches, columns, generator=generator, dtype=torch.float64)
    return mean, torch.rand(batches, columns, generator=generator, dtype=torch.float64) * 9


def record(mean: Tensor, variance: Tensor, unit: int) -> Recorded:
    return Recorded(mean, variance, unit, values=8, by_batch=False, bytes=0)


def add(path: Path, slots: tuple[Slot, ...], mean: Tensor, variance: Tensor) -> Path:
    """Add micro-batches whose columns are the channels of ``slots``, side by side."""
    sizes = [path.layers[index].info.channels for index, _ in slots]
    parts = zip(slots, mean.split(sizes, 1), variance.split(sizes, 1), strict=True)
    path.add({slot: record(means, variances, unit=path.batch_size) for slot, means, variances in parts})
    return path


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 999))
def test_in_pieces_as_in_one_go(pieces: list[int], seed: int) -> None:
    both, slots = layers(3, 2), ((0, 0), (1, 0), (1, 1))
    mean, variance = statistics(sum(pieces), 7, seed)
    whole, parts = (Path(both, 4, CPU) for _ in range(2))
    add(whole, slots, mean, variance)
    for means, variances in zip(mean.split(pieces), variance.split(pieces), strict=True):
        add(parts, slots, means, variances)
    assert whole.batches == parts.batches == sum(pieces)
    for name in ("count", "total", "square", "layer_count", "layer_total", "layer_square"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    for one, other in ((whole.r, parts.r), (whole.d, parts.d)):
        assert torch.equal(one.histogram, other.histogram)
        for name in ("count", "total", "square", "clipped", "low", "high"):
            torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-12, atol=1e-12)


def test_every_slot_has_its_own_channels() -> None:
    both, slots = layers(3, 2), ((0, 0), (1, 0), (1, 1))
    mean, variance = statistics(5, 7)
    sums = add(Path(both, 4, CPU), slots, mean, variance)
    found = []
    for layer, columns in ((both[0], slice(0, 3)), (both[1], slice(3, 5)), (both[1], slice(5, 7))):
        info = layer.info
        eps = torch.full((info.channels,), info.eps, dtype=torch.float64)
        zeros, ones = torch.zeros_like(eps), torch.ones_like(eps)
        values = corrections(mean[:, columns], variance[:, columns], zeros, ones, eps)
        found.append(values.mismatch.mean(1))
        slot = len(found) - 1
        assert sums.total[slot] == pytest.approx(float(found[-1].sum()))
        assert sums.square[slot] == pytest.approx(float(found[-1].square().sum()))
        assert sums.r.high[slot] == pytest.approx(float(values.r.max()))
        assert sums.d.low[slot] == pytest.approx(float(values.d.min()))
        assert sums.r.clipped[slot] == int(((values.r > 3) | (values.r < 1 / 3)).sum())
        assert sums.r.count[slot] == values.r.numel()
    # The calls of one micro-batch are averaged before they are squared.
    assert sums.layer_total[1] == pytest.approx(float((found[1] + found[2]).sum() / 2))
    assert sums.layer_square[1] == pytest.approx(float(((found[1] + found[2]) / 2).square().sum()))


@given(st.integers(1, 4), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 999))
def test_images_left_over_wait_for_the_next_step(size: int, steps: list[int], seed: int) -> None:
    (layer,) = layers(2)
    mean, variance = statistics(sum(steps), 2, seed)
    path = Path((layer,), size, CPU)
    for means, variances in zip(mean.split(steps), variance.split(steps), strict=True):
        path.add({(0, 0): record(means, variances, unit=1)})
    whole = sum(steps) // size * size
    if not whole:
        assert path_evidence(path).batches == 0
        return
    expected = add(Path((layer,), size, CPU), ((0, 0),), *pool_moments(mean[:whole], variance[:whole], size))
    found = layer_sums(path)[0]
    assert found.count == whole // size
    assert found.total == pytest.approx(float(expected.total), rel=1e-12)
    assert found.square == pytest.approx(float(expected.square), rel=1e-12)


def test_steps_that_make_other_calls_are_merged() -> None:
    both = layers(3, 2)
    mean, variance = statistics(6, 5)
    path = Path(both, 4, CPU)
    first, second = record(mean[:4, :3], variance[:4, :3], 4), record(mean[:4, 3:], variance[:4, 3:], 4)
    path.add({(0, 0): first, (1, 0): second})
    path.add({(0, 0): record(mean[4:, :3], variance[4:, :3], 4)})
    path.add({})
    found = path_evidence(path)
    assert {slot: call.mismatch.count for slot, call in found.calls.items()} == {(0, 0): 6, (1, 0): 4}
    assert {index: sums.count for index, sums in found.layers.items()} == {0: 6, 1: 4}
    alone = Path(both, 4, CPU)
    alone.add({(0, 0): record(mean[:, :3], variance[:, :3], 4)})
    expected = path_evidence(alone).calls[0, 0]
    merged = found.calls[0, 0]
    assert merged.mismatch.total == pytest.approx(expected.mismatch.total, rel=1e-12)
    np.testing.assert_array_equal(merged.r.histogram, expected.r.histogram)
    assert (merged.r.low, merged.r.high, merged.r.clipped) == (expected.r.low, expected.r.high, expected.r.clipped)


def test_the_step_of_the_first_bad_value_is_kept() -> None:
    both = layers(1, 1)
    sums, slots = Path(both, 4, CPU), ((0, 0), (1, 0))
    good, bad = torch.ones(1, 2).double(), torch.tensor([[1.0, float("nan")]]).double()
    for mean in (good, bad, bad):
        add(sums, slots, mean, good)
    assert sums.first_bad.tolist() == [-1, 1]


def test_memory_does_not_grow_with_the_number_of_micro_batches() -> None:
    (layer,) = layers(2)
    sums = Path((layer,), 4, CPU)

    def held() -> int:
        parts = [vars(sums), vars(sums.r), vars(sums.d)]
        return sum(value.numel() for part in parts for value in part.values() if isinstance(value, Tensor))

    add(sums, ((0, 0),), *statistics(2, 2))
    before = held()
    add(sums, ((0, 0),), *statistics(1000, 2))
    assert held() == before


def test_memory_does_not_grow_with_the_ways_in_which_layers_are_called() -> None:
    several = layers(2, 2, 2, 2)
    sums = Path(several, 4, CPU)
    add(sums, tuple((index, 0) for index in range(4)), *statistics(3, 8))
    before = sums.r.histogram.numel()
    for called in range(1, 15):
        slots = tuple((index, 0) for index in range(4) if called >> index & 1)
        add(sums, slots, *statistics(3, 2 * len(slots), called))
    assert sums.r.histogram.numel() == before
    assert sums.count.tolist() == [24.0] * 4


def test_a_call_that_first_comes_later_finds_room() -> None:
    both = layers(3, 2)
    mean, variance = statistics(6, 5)
    sums = Path(both, 4, CPU)
    add(sums, ((0, 0),), mean[:2, :3], variance[:2, :3])
    add(sums, ((1, 0), (0, 0)), mean[2:, [3, 4, 0, 1, 2]], variance[2:, [3, 4, 0, 1, 2]])
    found, whole = path_evidence(sums), path_evidence(add(Path(both, 4, CPU), ((0, 0), (1, 0)), mean, variance))
    assert found.calls[0, 0].mismatch.total == pytest.approx(whole.calls[0, 0].mismatch.total, rel=1e-12)
    np.testing.assert_array_equal(found.calls[0, 0].d.histogram, whole.calls[0, 0].d.histogram)
    assert found.calls[1, 0].mismatch.count == 4

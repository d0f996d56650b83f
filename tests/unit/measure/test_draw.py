"""Statistics without each part of their data: taken anew, or put together from those of the parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bnprobe.measure.batch import MicroBatch
from bnprobe.measure.draw import draw_of
from bnprobe.measure.forward_pass import LayerStatistics
from bnprobe.measure.physical_batch import Batching
from support.running import REAL

TOGETHER = replace(REAL, trusted=True)


def numbers(*sizes: int) -> list[MicroBatch]:
    """Counting up from 0."""
    values = torch.arange(float(sum(sizes)), dtype=torch.float64).view(-1, 1)
    return [MicroBatch(part, len(part)) for part in values.split(list(sizes))]


class Taking:
    """Takes the statistics of the numbers themselves, and where there are such of those above 5; notes of which."""

    def __init__(self) -> None:
        self.taken: list[list[int]] = []

    def __call__(self, some: Sequence[MicroBatch]) -> LayerStatistics:
        data = torch.cat([batch.data for batch in some])
        self.taken.append(data.int().flatten().tolist())
        large = data[data > 5].view(-1, 1)
        found = {0: (data.mean(0), data.var(0, correction=0))}
        return {**found, 1: (large.mean(0), large.var(0, correction=0))} if len(large) else found


def without(
    given: list[MicroBatch], *, brief: bool, together: bool = False
) -> tuple[list[LayerStatistics], list[list[int]]]:
    """The statistics without each part, and what was taken for them."""
    batching, take = Batching(given[0].samples, TOGETHER if together else REAL), Taking()
    found = list(draw_of(take, Taking()(given), given, batching, None, brief).without())
    return found, take.taken


def test_taken_anew_they_are_of_all_other_parts() -> None:
    found, taken = without(numbers(2, 2, 2, 2, 2), brief=False)
    assert taken == [[2, 3, 4, 5, 6, 7], [0, 1, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 8, 9]]
    assert len(found) == 4


def test_put_together_every_part_is_taken_once_and_gives_about_the_same() -> None:
    values = torch.randn(400, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 7
    given = [MicroBatch(part, 10) for part in values.split(10)]
    anew, _ = without(given, brief=False)
    together, taken = without(given, brief=True)
    assert [len(each) for each in taken] == [300] * 4  # numbers of three channels
    for one, other in zip(anew, together, strict=True):
        for expected, actual in zip(one[0], other[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)


def test_the_shift_is_in_standard_deviations_and_the_variance_moves_by_its_ratio() -> None:
    """The values are of larger batches than the parts, and keep their own scale."""
    parts = {k: (torch.tensor([float(k)]), torch.tensor([1.0 + k])) for k in range(4)}
    given = [MicroBatch(k, 1) for k in range(4)]
    values = {0: (torch.tensor([10.0]), torch.tensor([400.0]))}
    draw = draw_of(lambda some: {0: parts[some[0].data]}, values, given, Batching(1, REAL), None, True)
    means, variances = (torch.stack([part[place] for part in parts.values()]) for place in (0, 1))

    def pooled(rows: list[int]) -> tuple[Tensor, Tensor]:
        mean = means[rows].mean(0)
        return mean, (variances[rows] + (means[rows] - mean).square()).mean(0)

    mean, variance = pooled([0, 1, 2, 3])
    found = list(draw.without())
    assert len(found) == 4
    for left_out, each in enumerate(found):
        other, spread = pooled([k for k in range(4) if k != left_out])
        torch.testing.assert_close(each[0][0], 10 + (other - mean) / variance.sqrt() * 20)
        torch.testing.assert_close(each[0][1], 400 * spread / variance)


def test_a_channel_that_never_varies_stays_as_it_is() -> None:
    zero = {0: (torch.tensor([3.0]), torch.tensor([0.0]))}
    given = [MicroBatch(k, 1) for k in range(4)]
    found = list(draw_of(lambda some: zero, zero, given, Batching(1, REAL), None, True).without())
    assert [(float(mean), float(variance)) for each in found for mean, variance in each.values()] == [(3.0, 0.0)] * 4


@pytest.mark.parametrize("brief", [False, True])
def test_few_micro_batches_are_divided_where_samples_may_be_mixed(brief: bool) -> None:
    found, taken = without(numbers(16), brief=brief, together=True)
    quarters = [[place, place + 4, place + 8, place + 12] for place in range(4)]
    others = [sorted({*range(16)} - {*quarter}) for quarter in quarters]
    assert len(found) == 4
    assert [sorted(each) for each in taken] == (quarters if brief else others)


@pytest.mark.parametrize("brief", [False, True])
def test_of_two_micro_batches_that_cannot_be_divided_each_is_one_part(brief: bool) -> None:
    found, taken = without(numbers(4, 4), brief=brief)
    assert (len(found), taken) == (2, [[4, 5, 6, 7], [0, 1, 2, 3]])


def test_where_a_part_lacks_a_layer_they_are_taken_anew() -> None:
    """The large numbers are all in the last part: those without it lack that layer, too."""
    found, taken = without(numbers(2, 2, 2, 2), brief=True)
    assert [len(each) for each in taken] == [2] * 4 + [6] * 4
    assert [set(each) for each in found] == [{0, 1}, {0, 1}, {0, 1}, {0}]


def test_the_part_of_a_finite_data_set() -> None:
    given = numbers(2, 2, 2, 2)
    for population, sampled in ((None, 0.0), (16, 0.5), (8, 1.0), (4, 1.0)):
        assert draw_of(Taking(), {}, given, Batching(2, REAL), population, False).sampled == sampled

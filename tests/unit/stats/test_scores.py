"""Differences of losses and metrics: against slow references, and how often their intervals hold the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from bnprobe.records import Estimate
from bnprobe.stats.scores import FEWEST_CLUSTERS, Scores, independent_difference, paired_difference, with_draw

Values = NDArray[np.float64]
TRIALS = 800


def scores(samples: Values, size: int, known: bool = True) -> Scores:
    """Of consecutive micro-batches of ``size`` samples; the last one may be smaller."""
    parts = [samples[start : start + size] for start in range(0, len(samples), size)]
    batches = torch.tensor([part.mean() for part in parts], dtype=torch.float64)
    sizes = torch.tensor([float(len(part)) for part in parts], dtype=torch.float64)
    return Scores(batches, sizes, torch.tensor(samples) if known else None)


def random(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_mean_is_over_samples_and_without_these_over_micro_batches() -> None:
    values = random(0).normal(size=10)
    assert scores(values, 4).mean == pytest.approx(values.mean())
    parts = [values[:4].mean(), values[4:8].mean(), values[8:].mean()]
    assert scores(values, 4, known=False).mean == pytest.approx(np.mean(parts))
    assert scores(values, 4).count == 10


def test_a_paired_difference_by_sample_is_the_paired_t_interval() -> None:
    before, after = random(1).normal(size=(2, 24))
    found = paired_difference(scores(after, 5), scores(before, 5), shared=False)
    slow = stats.ttest_rel(after, before).confidence_interval()
    assert found.mean == pytest.approx((after - before).mean())
    assert found.interval == pytest.approx((slow.low, slow.high))


@pytest.mark.parametrize("known", [True, False])
def test_many_micro_batches_that_share_statistics_are_the_unit(known: bool) -> None:
    before, after = random(2).normal(size=(2, 4 * FEWEST_CLUSTERS))
    found = paired_difference(scores(after, 4, known), scores(before, 4, known), shared=True)
    slow = stats.ttest_rel(after.reshape(-1, 4).mean(1), before.reshape(-1, 4).mean(1)).confidence_interval()
    assert found.interval == pytest.approx((slow.low, slow.high))


def test_where_a_part_of_the_samples_is_known_their_spread_stands_for_all() -> None:
    before, after = random(3).normal(size=(2, 64))
    few = [Scores(each.batches, each.sizes, each.samples[:16]) for each in (scores(after, 8), scores(before, 8))]
    found = paired_difference(*few, shared=False)
    difference = after - before
    half = stats.t.ppf(0.975, 15) * difference[:16].std(ddof=1) / math.sqrt(64)
    assert found.interval == pytest.approx((difference.mean() - half, difference.mean() + half))


def test_one_micro_batch_gives_an_interval_over_its_samples() -> None:
    before, after = random(4).normal(size=(2, 32))
    assert paired_difference(scores(after, 32), scores(before, 32), shared=True).interval is not None
    assert paired_difference(scores(after, 32, False), scores(before, 32, False), shared=True).interval is None


def test_pairs_of_a_metric_that_all_agree_are_not_certain() -> None:
    right = np.ones(12)
    low, high = paired_difference(scores(right, 4), scores(right, 4), shared=False).interval
    assert low < 0 < high
    assert high == pytest.approx(stats.t.ppf(0.975, 11) / 14)
    low, high = independent_difference(scores(right, 4), scores(right, 4)).interval
    assert low < 0 < high


def test_two_of_twelve_changes_are_not_significant_and_nine_are() -> None:
    before = np.ones(12)
    for changed, significant in ((2, False), (9, True)):
        after = np.where(np.arange(12) < changed, 0.0, 1.0)
        low, high = paired_difference(scores(after, 4), scores(before, 4), shared=False).interval
        assert low <= -changed / 12 <= high
        assert (high < 0) == significant


@pytest.mark.parametrize("known", [True, False])
def test_differences_that_are_all_the_same_to_rounding_give_no_interval(known: bool) -> None:
    values = random(5).normal(size=8)
    for after in (values, values + 0.5, values + 1e-8 * random(6).normal(size=8)):
        assert paired_difference(scores(after, 4, known), scores(values, 4, known), shared=False).interval is None
    assert paired_difference(scores(values[:1], 1), scores(values[1:2], 1), shared=False).interval is None


@pytest.mark.parametrize("sampled", [0.0, 0.75])
def test_an_interval_that_covers_the_draw_of_statistics_has_the_variance_of_the_jackknife(sampled: float) -> None:
    values = random(3).normal(size=4)
    found = with_draw(Estimate(-1.0, (-1.5, -0.2)), torch.tensor(values), sampled)
    variance = (1 - sampled) * 3 / 4 * sum((value - values.mean()) ** 2 for value in values)
    half = float(stats.t.ppf(0.975, 3)) * math.sqrt(variance)
    assert found.mean == -1.0
    assert found.interval == pytest.approx((-1 - math.sqrt(0.5**2 + half**2), -1 + math.sqrt(0.8**2 + half**2)))


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan, 2.0]])
def test_where_the_draw_of_statistics_is_not_known_there_is_no_interval(values: list[float]) -> None:
    assert with_draw(Estimate(-1.0, (-1.5, -0.2)), torch.tensor(values, dtype=torch.float64)).interval is None


def test_intervals_of_a_figure_from_drawn_statistics_hold_the_truth() -> None:
    """Squared distance of samples to a mean that is taken of other samples, against their squared distance to 1."""

    def holds(chance: np.random.Generator) -> bool:
        scored, drawn = chance.normal(size=400), chance.normal(0.3, 1.0, size=40)

        def gains(mean: float) -> Values:
            return (scored - mean) ** 2 - (scored - 1) ** 2

        without = [gains(np.delete(drawn, np.s_[part::4]).mean()).mean() for part in range(4)]
        change = paired_difference(scores(gains(drawn.mean()), 32), scores(0 * scored, 32), shared=False)
        low, high = with_draw(change, torch.tensor(without)).interval
        return low <= 0.3**2 - 1 <= high

    assert 0.93 <= np.mean([holds(random(seed)) for seed in range(TRIALS)]) <= 0.98


def test_an_independent_difference_is_that_of_welch() -> None:
    one, other = random(6).normal(size=24), random(7).normal(1, 3, size=40)
    slow = stats.ttest_ind(one, other, equal_var=False).confidence_interval()
    found = independent_difference(scores(one, 8), scores(other, 8))
    assert found.interval == pytest.approx((slow.low, slow.high))
    assert found.mean == pytest.approx(one.mean() - other.mean())


def loss(chance: np.random.Generator, number: int, batch_effect: float, size: int) -> tuple[Values, Values]:
    """Cross entropies before and after, whose difference is 0.1 on average; a part of it is common to a micro-batch."""
    hard = chance.gamma(0.5, 1.0, number)
    common = np.repeat(chance.normal(0, batch_effect, -(-number // size)), size)[:number]
    return hard, hard + 0.1 + common + chance.gamma(1.0, 0.2, number) - 0.2


def hits(chance: np.random.Generator, number: int, before: float, lost: float, won: float) -> tuple[Values, Values]:
    """A 0/1 metric: of what is right before, a part is lost, of what is wrong a part is won."""
    was = (chance.random(number) < before).astype(float)
    draw = chance.random(number)
    return was, np.where(was == 1, (draw >= lost).astype(float), (draw < won).astype(float))


def coverage(made: Callable[[np.random.Generator], tuple[Scores, Scores, bool]], truth: float, paired: bool) -> float:
    held = 0
    for trial in range(TRIALS):
        after, before, shared = made(random(trial))
        found = paired_difference(after, before, shared=shared) if paired else independent_difference(after, before)
        low, high = found.interval or (math.nan, math.nan)
        held += low <= truth <= high
    return held / TRIALS


@pytest.mark.parametrize(
    ("number", "size", "effect", "shared"), [(256, 8, 0.1, True), (64, 64, 0, True), (60, 32, 0, False)]
)
def test_intervals_of_a_loss_hold_the_truth(number: int, size: int, effect: float, shared: bool) -> None:
    def made(chance: np.random.Generator) -> tuple[Scores, Scores, bool]:
        before, after = loss(chance, number, effect, size)
        return scores(after, size), scores(before, size), shared

    assert 0.93 <= coverage(made, 0.1, paired=True) <= 0.97


@pytest.mark.parametrize(
    ("number", "lost", "won"), [(256, 0.05, 0.2), (64, 0.1, 0.3), (400, 0.02, 0.02), (60, 0.5, 0.1)]
)
def test_intervals_of_an_accuracy_hold_the_truth(number: int, lost: float, won: float) -> None:
    def made(chance: np.random.Generator) -> tuple[Scores, Scores, bool]:
        before, after = hits(chance, number, 0.9, lost, won)
        return scores(after, 32), scores(before, 32), False

    assert 0.93 <= coverage(made, 0.1 * won - 0.9 * lost, paired=True) <= 0.98


@pytest.mark.parametrize(
    ("first", "second", "numbers"), [(0.95, 0.9, (256, 60)), (0.97, 0.5, (512, 60)), (0.9, 0.9, (64, 64))]
)
def test_intervals_of_the_gap_to_held_out_data_hold_the_truth(
    first: float, second: float, numbers: tuple[int, int]
) -> None:
    def made(chance: np.random.Generator) -> tuple[Scores, Scores, bool]:
        one, other = (
            (chance.random(number) < p).astype(float) for number, p in zip(numbers, (first, second), strict=True)
        )
        return scores(one, 32), scores(other, 32), False

    assert 0.93 <= coverage(made, first - second, paired=False) <= 0.975

"""E-processes: what they add up, and how often they are wrong."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from bnprobe.stats.sequential import _BETS, _HIGH, _LOW, _MEMORIES, Exchangeable, MeansAbove, rejected


def _entering(start: int) -> float:
    return 1 / math.sqrt(start + 1) - 1 / math.sqrt(start + 2)


def _stake(before: list[float], limit: float, memory: float) -> float:
    """Of the bets the one that would have won most on the values before, older ones counting less; else 0."""
    best, stake = 0.0, 0.0
    for bet in _BETS:
        logs = [math.log(1 + bet * (value / limit - 1)) for value in before]
        won = math.fsum(memory**age * log for age, log in enumerate(reversed(logs)))
        if won > best:
            best, stake = won, float(bet)
    return stake


def _reference(values: list[float], limit: float) -> float:
    """The e-value by its definition: a bettor for every beginning and way to bet, and the capital still to come."""
    ways = [[bet] * len(values) for bet in _BETS]
    ways += [[_stake(values[:place], limit, each) for place in range(len(values))] for each in _MEMORIES]
    total = 0.0
    for stakes in ways:
        for start in range(len(values)):
            capital = _entering(start)
            for stake, value in zip(stakes[start:], values[start:], strict=True):
                capital *= 1 + stake * (value / limit - 1)
            total += capital / len(ways)
    return total + math.fsum(_entering(start) for start in range(len(values), 10_000)) + 1 / math.sqrt(10_001)


def test_equals_its_definition() -> None:
    values = [0.3, 0.0, 2.5, 1.0, 4.0, 0.7, 1.1, 0.2, 3.0]
    test = MeansAbove(1)
    for seen, value in enumerate(values, 1):
        test.update([value], 0.8)
        assert test.e_values()[0] == pytest.approx(_reference(values[:seen], 0.8), rel=1e-9)


def test_is_one_on_average_where_the_mean_is_the_limit() -> None:
    """Over all sequences of a coin that shows 0 or twice the limit: an e-process is a martingale here."""
    found = []
    for sequence in itertools.product((0.0, 2.0), repeat=8):
        test = MeansAbove(1)
        for value in sequence:
            test.update([value], 1.0)
        found.append(test.e_values()[0])
    assert math.fsum(found) / len(found) == pytest.approx(1.0, rel=1e-12)


Draw = Callable[[np.random.Generator, MeansAbove, np.ndarray], np.ndarray]
"""The next value of every run, of mean 1 whatever came before; by the tests and the values so far, (runs, seen)."""


def _gamma(shape: float) -> Draw:
    return lambda random, test, before: random.gamma(shape, 1 / shape, len(before))


def _bursts(random: np.random.Generator, test: MeansAbove, before: np.ndarray) -> np.ndarray:
    """Log-normal, of a spread that grows with the last values: calm and wild times, far from independent."""
    spread = np.minimum(0.2 + 0.5 * before[:, -5:].max(1, initial=0.0), 2.0)
    found: np.ndarray = np.exp(spread * random.normal(size=len(before)) - spread**2 / 2)
    return found


def _pareto(random: np.random.Generator, test: MeansAbove, before: np.ndarray) -> np.ndarray:
    """Heavy tails: no variance."""
    found: np.ndarray = (1 + random.pareto(1.5, len(before))) / 3
    return found


def _adversary(random: np.random.Generator, test: MeansAbove, before: np.ndarray) -> np.ndarray:
    """Sees the capital: 0, or so much that the alarm is about reached, as seldom as the mean allows."""
    needed = np.clip(20 / test.e_values() / 0.4, 1.5, 50.0)
    found: np.ndarray = needed * (random.random(len(before)) < 1 / needed)
    return found


def _alarms(draw: Draw, peeks: bool = False) -> float:
    """The part of 2,000 runs of 300 looks that reach 20; bettors who peek have seen the value that they bet on."""
    random, test = np.random.default_rng(0), MeansAbove(2_000)
    values, alarmed = np.empty((2_000, 0)), np.zeros(2_000, dtype=bool)
    for _ in range(300):
        new = draw(random, test, values)
        if peeks:
            ahead = copy.deepcopy(test)
            ahead.update(new, 1.0)
            test._lately = ahead._lately
        test.update(new, 1.0)
        values = np.column_stack([values, new])
        alarmed |= test.e_values() >= 20
    return float(alarmed.mean())


_BOUND = 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2_000)
"""What is stated, and three standard errors of 2,000 runs."""


@pytest.mark.parametrize("draw", [_gamma(0.2), _gamma(1.0), _gamma(8.0), _bursts, _pareto, _adversary])
def test_false_alarms_in_a_whole_run_are_no_more_than_stated(draw: Draw) -> None:
    """Means at the limit itself, looked at 300 times: Ville's inequality, which holds against an adversary, too."""
    assert _alarms(draw) <= _BOUND


def test_bettors_who_have_seen_the_value_would_raise_more() -> None:
    """So what is tested above can fail."""
    assert _alarms(_gamma(1.0), peeks=True) > 2 * _BOUND


@pytest.mark.parametrize(("healthy", "times"), [(0, 2.0), (50, 3.0), (1_000, 20.0)])
def test_an_excess_is_found_whenever_it_begins(healthy: int, times: float) -> None:
    draws, test = np.random.default_rng(1), MeansAbove(1)
    for value in draws.gamma(4.0, 0.5 / 4.0, healthy):
        test.update([value], 1.0)
    assert test.e_values()[0] < 20
    values = draws.gamma(4.0, times / 4.0, 200)
    delay = 0
    while test.e_values()[0] < 20:
        test.update([values[delay]], 1.0)
        delay += 1
    # What the healthy values took from the capital hardly depends on how many there were.
    assert delay <= 2 * math.log(20 * 8) / math.log(1 + 0.65 * (times - 1)) + 2


def test_a_value_that_is_missing_changes_nothing_and_an_infinite_one_is_an_alarm() -> None:
    test = MeansAbove(2)
    test.update([math.nan, math.inf], 1.0)
    assert test.e_values()[0] == 1.0
    assert test.e_values()[1] > 1_000
    for _ in range(100):
        test.update([math.nan, math.inf], 1.0)
    assert np.isfinite(test.e_values()).all()
    test.forget(1)
    assert test.e_values().tolist() == [1.0, 1.0]


def test_a_saved_state_goes_on() -> None:
    values = np.random.default_rng(2).gamma(1.0, 1.5, (20, 3))
    whole, first, second = MeansAbove(3), MeansAbove(3), MeansAbove(3)
    for row in values:
        whole.update(row, 1.0)
    for row in values[:11]:
        first.update(row, 1.0)
    second.restore(json.loads(json.dumps(first.state())))
    for row in values[11:]:
        second.update(row, 1.0)
    assert second.e_values().tolist() == whole.e_values().tolist()


def test_rejections_name_the_largest() -> None:
    assert rejected([1.0, 1.0, 1.0], 0.05) == []
    assert rejected([59.0, 1.0, 1.0], 0.05) == []
    assert rejected([1.0, 60.0, 1.0], 0.05) == [1]
    assert rejected([21.0, 20.0, 25.0], 0.05) == [2, 0, 1]
    assert rejected([], 0.05) == []


# --- Exchangeable -----------------------------------------------------------------------------------------------------


def _conformal(calibration: list[float], stream: list[float], draws: list[float]) -> float:
    """The e-value by its definition: every score ranked among all before it, and a bettor for every beginning."""
    before, bets = list(calibration), []
    for score, drawn in zip(stream, draws, strict=True):
        above, tied = sum(each > score for each in before), sum(each == score for each in before)
        p = (above + drawn * (tied + 1)) / (len(before) + 1)
        bets.append([k * p ** (k - 1) for k in _HIGH] + [k * (1 - p) ** (k - 1) for k in _LOW])
        before.append(score)
    total = 0.0
    for way in range(len(_HIGH) + len(_LOW)):
        for start in range(len(bets)):
            won = math.prod(each[way] for each in bets[start:])
            total += won * _entering(start) / (len(_HIGH) + len(_LOW))
    return total + 1 / math.sqrt(len(bets) + 1)


def test_a_conformal_test_equals_its_definition() -> None:
    calibration, stream = [3.0, 1.0, 2.0, 2.0], [2.0, 5.0, 0.5, 2.0, 9.0]
    test, same = Exchangeable([[each] for each in calibration], seed=4), np.random.default_rng(4)
    for score in stream:
        test.update([score])
    draws = [1 - same.random() for _ in stream]
    assert test.e_values()[0] == pytest.approx(_conformal(calibration, stream, draws), rel=1e-9)


def test_bets_on_uniform_p_values_are_fair() -> None:
    """Their mean is 1, to be integrated where they are finite: k p^(k-1) from a to 1 is 1 - a^k."""
    grid = np.linspace(0.01, 1, 200_001)
    for k in (*_HIGH, *_LOW):
        assert np.trapezoid(k * grid ** (k - 1), grid) == pytest.approx(1 - 0.01**k, abs=1e-4)


@pytest.mark.parametrize("most", [16, 2048])
def test_p_values_are_uniform_and_independent_whatever_the_size_of_the_calibration(most: int) -> None:
    """Also once rows are dropped: here 16 are kept, of a stream of 60; a calibration that stays would fail."""
    found = []
    for run in range(600):
        draws = np.random.default_rng([run, 1])
        test = Exchangeable(draws.normal(size=(8, 1)), seed=run, most=most)
        values = []
        for score in draws.normal(size=60):
            values.append(float(test._p_values(np.array([score]))[0]))
            test.update([score])
        found.append(values)
    p = np.array(found)
    # Means of a stream vary as those of 60 independent uniform values do: a common error would add to that.
    assert p.mean() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / p.size))
    assert p.mean(1).var() == pytest.approx(1 / 12 / 60, rel=4 * math.sqrt(2 / 600))


@pytest.mark.parametrize("calibration", [16, 200])
def test_healthy_streams_raise_no_more_alarms_than_stated(calibration: int) -> None:
    """Heavy tails, ties, and series that are nearly the same: the mean of their e-values, at 100 looks of 200 runs."""
    runs, alpha, alarms = 200, 0.05, 0
    for run in range(runs):
        draws = np.random.default_rng([run, 2])
        common = draws.standard_t(2, size=calibration + 100)
        rows = np.stack([common, np.round(common), common + draws.normal(size=len(common))], axis=1)
        test = Exchangeable(rows[:calibration], seed=run, most=128)
        for row in rows[calibration:]:
            test.update(row)
            if test.e_values().mean() >= 1 / alpha:
                alarms += 1
                break
    assert alarms / runs <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


@pytest.mark.parametrize(("healthy", "shift", "delay"), [(0, 3.0, 10), (500, 3.0, 20), (500, 1.0, 60), (0, -3.0, 30)])
def test_a_shift_of_scores_is_found_whenever_it_begins(healthy: int, shift: float, delay: int) -> None:
    draws = np.random.default_rng(3)
    test = Exchangeable(draws.normal(size=(100, 1)))
    for score in draws.normal(size=healthy):
        test.update([score])
    assert test.e_values()[0] < 100
    for _ in range(delay):
        test.update([draws.normal() + shift])
    assert test.e_values()[0] > 100


def test_a_score_that_is_not_finite_is_the_largest() -> None:
    test = Exchangeable(np.arange(100.0)[:, None])
    for _ in range(12):
        test.update([math.nan])
    assert 1_000 < test.e_values()[0] < math.inf


def test_scores_that_come_to_differ_more_in_both_directions_are_found_where_they_are_signed() -> None:
    def first(scale: float, signed: bool) -> int | None:
        draws = np.random.default_rng(1)
        test = Exchangeable(np.empty((0, 1)), signed=signed)
        for row in range(400):
            test.update([draws.normal() * (scale if row >= 200 else 1.0)])
            if test.e_values()[0] >= 20:
                return row
        return None

    found, otherwise = first(3.0, signed=True), first(3.0, signed=False)
    assert found is not None
    assert 200 < found <= 230
    assert otherwise is None or otherwise > found
    assert first(1.0, signed=True) is None


@pytest.mark.parametrize("sign", [1, -1])
def test_small_scores_are_as_odd_as_large_ones_where_they_are_signed(sign: int) -> None:
    draws = np.random.default_rng(1).normal(size=(120, 1)) * 0.1
    draws[100:] += sign
    test = Exchangeable(np.empty((0, 1)), seed=3, signed=True)
    for row in draws[:100]:
        test.update(row)
    assert test.e_values()[0] < 20
    for row in draws[100:115]:
        test.update(row)
    assert test.e_values()[0] >= 20
    assert 15 <= test.since[0] <= 18


def test_a_saved_conformal_test_goes_on() -> None:
    draws = np.random.default_rng(2).normal(size=(300, 2))
    one, other = (Exchangeable(np.empty((0, 2)), seed=5, most=64, signed=True) for _ in range(2))
    for row in draws[:150]:
        one.update(row)
    other.restore(json.loads(json.dumps(one.state())))
    for row in draws[150:]:
        one.update(row)
        other.update(row)
        assert np.array_equal(one.e_values(), other.e_values())
        assert np.array_equal(one.since, other.since)

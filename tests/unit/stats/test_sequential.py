"""E-processes: what they add up, and how often they are wrong."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from bnprobe.stats.sequential import _BETS, _HIGH, _LOW, Exchangeable, MeansAbove, rejected


def _reference(values: list[float], limit: float) -> float:
    """The e-value by its definition: a bettor for every beginning and stake, and the capital of those still to come."""
    total = 0.0
    for bet in _BETS:
        for start in range(len(values)):
            capital = 1 / ((start + 1) * (start + 2))
            for value in values[start:]:
                capital *= 1 + bet * (value / limit - 1)
            total += capital / len(_BETS)
    return total + math.fsum(1 / ((start + 1) * (start + 2)) for start in range(len(values), 100_000))


def test_equals_its_definition() -> None:
    values = [0.3, 0.0, 2.5, 1.0, 4.0, 0.7]
    test = MeansAbove(1)
    for value in values:
        test.update([value], 0.8)
    assert test.e_values()[0] == pytest.approx(_reference(values, 0.8), abs=2e-5)


def test_is_one_on_average_where_the_mean_is_the_limit() -> None:
    """Over all sequences of a coin that shows 0 or twice the limit: an e-process is a martingale here."""
    found = []
    for sequence in itertools.product((0.0, 2.0), repeat=8):
        test = MeansAbove(1)
        for value in sequence:
            test.update([value], 1.0)
        found.append(test.e_values()[0])
    assert math.fsum(found) / len(found) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("shape", [0.2, 1.0, 8.0])
def test_false_alarms_in_a_whole_run_are_no_more_than_stated(shape: float) -> None:
    """Gamma values whose mean is the limit itself, looked at 300 times in each of 2,000 runs."""
    runs, alpha = 2_000, 0.05
    draws = np.random.default_rng(0).gamma(shape, 1 / shape, (300, runs))
    test, alarmed = MeansAbove(runs), np.zeros(runs, dtype=bool)
    for values in draws:
        test.update(values, 1.0)
        alarmed |= test.e_values() >= 1 / alpha
    # The bound, and three standard errors of 2,000 runs.
    assert alarmed.mean() <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


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
    # Each value gains less than log(1 + 0.9 (x - 1)); what is to be gained is log(20) and the capital of the beginner.
    assert delay <= 3 * (math.log(20) + 2 * math.log(healthy + 2)) / math.log(1 + 0.65 * (times - 1)) + 5


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
    with pytest.raises(ValueError, match="3 series, and these are 2"):
        MeansAbove(2).restore(whole.state())


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
            total += won / ((start + 1) * (start + 2)) / (len(_HIGH) + len(_LOW))
    return total + 1 / (len(bets) + 1)


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

"""Tests that may be looked at after every value, for as long as one likes: e-processes.

A test on one noisy value raises an alarm sooner or later, however sound the run. An e-process does not: it starts at 1,
and whatever it is looked at, and whenever, the probability that it ever reaches 1 / alpha is at most alpha while the
hypothesis holds (Ville's inequality). See Ramdas et al. 2023, arXiv 2210.01948, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BETS = np.array([0.05, 0.15, 0.35, 0.65, 0.95])
"""Parts of the capital that are staked, side by side: small ones find small excesses, large ones large ones fast."""

_MEMORIES = np.array([0.5, 0.8, 0.95])
"""What the log of a win counts one value later, for bettors who stake what would have won most lately."""


class _Restarting:
    """Capital of bettors on many series, of whom one enters before each value: a change may begin at any time.

    The bettor who enters before value s has the capital 1 / sqrt(s) - 1 / sqrt(s + 1), divided evenly among ways to bet
    (Shin, Ramdas and Rinaldo 2023, arXiv 2203.03532, section 2, with weights that sum to 1 in place of a bound on the
    run length). What all of them have, together with the capital of those still to come, is the e-value of a series.

    Args:
        series: Their number.
        ways: In how many ways each bets.
    """

    def __init__(self, series: int, ways: int) -> None:
        self._seen = np.zeros(series, dtype=np.int64)
        self._capital = np.zeros((series, ways))

    def _bet(self, here: NDArray[np.bool_], won: NDArray[np.float64]) -> None:
        """Enter bettors, and multiply their capital by what they won on a value; only in the series ``here``."""
        seen = self._seen[here]
        entering = _still_to_come(seen) - _still_to_come(seen + 1)
        # Beyond any use as evidence, and far from what a float holds.
        self._capital[here] = np.minimum((self._capital[here] + entering[:, None]) * won, 1e150)
        self._seen[here] += 1

    def e_values(self) -> NDArray[np.float64]:
        """Evidence against the hypothesis of each series, shape (series,); at first 1."""
        found: NDArray[np.float64] = self._capital.mean(1) + _still_to_come(self._seen)
        return found

    def forget(self, series: int) -> None:
        """Begin a series again, where its alarm was dealt with."""
        self._seen[series], self._capital[series] = 0, 0.0

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes, of plain lists."""
        return {"seen": self._seen.tolist(), "capital": self._capital.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken, of as many series; the caller knows which they are."""
        self._seen = np.array(state["seen"], dtype=np.int64)
        self._capital = np.array(state["capital"], dtype=np.float64)


def _still_to_come(seen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Capital of the bettors who have not entered after so many values."""
    found: NDArray[np.float64] = 1.0 / np.sqrt(seen + 1.0)
    return found


class MeansAbove(_Restarting):
    """Tests of many series of values at least 0 side by side: does the mean of one stay at or below its limit?

    The hypothesis of a series is that, whatever came before, the next value has at most the limit as its mean. Nothing
    else is assumed: not independence, not a distribution, not that the values are alike over time.

    A bettor who stakes the part b of a capital at even odds on an excess has 1 + b (x / limit - 1) times the capital
    after the value x, which is no more on average where the hypothesis holds, whatever earlier values b depends on
    (Waudby-Smith and Ramdas 2023, arXiv 2010.09686, section 4). Some bettors stake the same part always, and lose it
    while values are below the limit. The others stake the part that would have won most lately, or nothing where none
    would have: they lose hardly anything before a change, and follow it after a value or two.

    Args:
        series: Their number.
    """

    def __init__(self, series: int) -> None:
        super().__init__(series, len(_BETS) + len(_MEMORIES))
        self._lately = np.zeros((series, len(_MEMORIES), len(_BETS)))

    def update(
        self, values: Sequence[float] | NDArray[np.float64], limits: Sequence[float] | NDArray[np.float64] | float
    ) -> None:
        """Take in one value of each series; NaN: none, and the series stays as it is.

        Args:
            values: At least 0, shape (series,). One that is infinite counts as a million times the limit.
            limits: Of the means, above 0; may differ from value to value, where what came before decides them.
        """
        ratio = np.minimum(np.asarray(values, dtype=np.float64) / limits, 1e6)
        here = ~np.isnan(ratio)
        excess, lately = ratio[here, None] - 1.0, self._lately[here]
        stakes = np.where(lately.max(2) > 0.0, _BETS[lately.argmax(2)], 0.0)
        won = 1.0 + _BETS * excess
        self._bet(here, np.concatenate([won, 1.0 + stakes * excess], axis=1))
        self._lately[here] = _MEMORIES[:, None] * lately + np.log(won)[:, None, :]

    def forget(self, series: int) -> None:
        super().forget(series)
        self._lately[series] = 0.0

    def state(self) -> dict[str, Any]:
        return {**super().state(), "lately": self._lately.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._lately = np.array(state["lately"], dtype=np.float64)


_HIGH, _LOW = np.array([0.15, 0.4, 0.7]), np.array([0.4])
"""Exponents of bets on p-values near 0 and near 1: small ones find large shifts fast, large ones small shifts."""

MOST_KEPT = 2048
"""Earlier scores that a new one is compared with, at most."""


class Exchangeable(_Restarting):
    """Tests of many series of scores side by side: is what comes exchangeable with what was seen before?

    The hypothesis is that rows of scores, one score for each series, are drawn independently from one distribution:
    those of a calibration and those of the stream alike. Nothing is assumed of that distribution, nor of how the series
    of a row depend on each other.

    The p-value of a score is its rank from above among the scores before it, ties broken at random. A martingale bets
    against it: k p^(k-1) times the capital, whose mean is 1 over uniform p-values, and the same with 1 - p (conformal
    test martingales: Vovk, Nouretdinov and Gammerman 2003; Volkhonskiy et al. 2017, arXiv 1706.03415).

    A calibration that stays as it is would not do: its finite size makes all p-values a little wrong in the same way,
    which a long stream finds out. So a row is compared with the calibration and the rows of the stream before it. Once
    there are ``most`` of these, the new row is added and one of all of them, drawn at random, is dropped. Which one
    does not depend on the scores. Given which rows were together and all that comes later, each of them is therefore
    equally likely to be the new one: p-values are exactly uniform, and those of a row independent of those of all
    other rows, whatever the size of the calibration and the length of the stream. The rate of false alarms is that over
    calibrations and streams together.

    What this costs: a shift enters the rows that it is compared with. One that was not found while it came to less than
    about as many rows as there were before it, is not found later either; and neither is one slower than ``most`` rows.

    Args:
        calibration: Scores of healthy data, shape (rows, series); more than ``most`` are not used.
        seed: Of the random ties and what is dropped, which must not depend on the data.
        most: See above.
        signed: Small scores are as odd as large ones, and so are scores that come to differ more in both directions:
            bets on p near 0, near 1, and near either.
    """

    def __init__(
        self,
        calibration: NDArray[np.float64] | Sequence[Sequence[float]],
        seed: int = 0,
        most: int = MOST_KEPT,
        signed: bool = False,
    ) -> None:
        given = np.asarray(calibration, dtype=np.float64)[:most]
        super().__init__(given.shape[1], 3 * len(_HIGH) if signed else len(_HIGH) + len(_LOW))
        self._signed = signed
        self._draws = np.random.default_rng(seed)
        self._kept = np.empty((most, given.shape[1]))
        self._kept[: len(given)] = given
        self._size = len(given)
        self._growth, self._since = np.zeros(given.shape[1]), np.zeros(given.shape[1], dtype=np.int64)

    def update(self, scores: Sequence[float] | NDArray[np.float64]) -> None:
        """Take in one row; NaN counts as infinite."""
        row = np.asarray(scores, dtype=np.float64)
        row = np.where(np.isnan(row), np.inf, row)
        p = self._p_values(row)[:, None]
        ways = [(_HIGH, p), (_LOW, 1.0 - p)]
        if self._signed:
            ways = [(_HIGH, p), (_HIGH, 1.0 - p), (_HIGH, 2.0 * np.minimum(p, 1.0 - p))]
        won = np.concatenate([exponents * each ** (exponents - 1.0) for exponents, each in ways], axis=1)
        self._bet(np.ones(len(row), dtype=bool), won)
        self._keep(row)
        # Page's rule: what was won since it was least begins where the shift seems to.
        self._growth = np.maximum(self._growth + np.log(won.mean(1)), 0.0)
        self._since = np.where(self._growth > 0, self._since + 1, 0)

    @property
    def since(self) -> NDArray[np.int64]:
        """How many rows ago what speaks against each series seems to have begun, shape (series,); 0: nothing does."""
        return self._since

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes, of plain values."""
        lately = {"growth": self._growth.tolist(), "since": self._since.tolist()}
        kept = self._kept[: self._size].tolist()
        return {**super().state(), **lately, "kept": kept, "draws": self._draws.bit_generator.state}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: It is of another number of series.
        """
        super().restore(state)
        self._growth = np.array(state["growth"], dtype=np.float64)
        self._since = np.array(state["since"], dtype=np.int64)
        self._size = len(state["kept"])
        self._kept[: self._size] = state["kept"]
        self._draws.bit_generator.state = state["draws"]

    def _p_values(self, row: NDArray[np.float64]) -> NDArray[np.float64]:
        """In (0, 1), shape (series,)."""
        before = self._kept[: self._size]
        above, tied = (before > row).sum(0), (before == row).sum(0)
        # One draw for the whole row: its series may depend on each other, its rows may not.
        drawn = 1.0 - self._draws.random()
        p: NDArray[np.float64] = (above + drawn * (tied + 1)) / (self._size + 1)
        return p.clip(1e-12, 1 - 1e-12)

    def _keep(self, row: NDArray[np.float64]) -> None:
        most = len(self._kept)
        position = self._size if self._size < most else int(self._draws.integers(most + 1))
        if position < most:  # else the new row is the one that is dropped
            self._kept[position] = row
            self._size = min(self._size + 1, most)


def rejected(e_values: Sequence[float] | NDArray[np.float64], alpha: float) -> list[int]:
    """The hypotheses that are rejected at a false discovery rate of ``alpha``, whatever their dependence.

    The e-BH procedure (Wang and Ramdas 2022, arXiv 2009.02824): the k largest of m, for the largest k at which each of
    them is at least m / (k alpha). If all hypotheses hold, the probability to reject any is at most alpha, at all times
    together.

    Returns:
        Positions, largest e-value first.
    """
    values = np.asarray(e_values, dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    enough = values[order] >= len(values) / (alpha * np.arange(1, len(values) + 1))
    most = int(np.flatnonzero(enough)[-1]) + 1 if enough.any() else 0
    return [int(position) for position in order[:most]]

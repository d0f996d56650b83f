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

_BETS = np.array([0.05, 0.15, 0.35, 0.65, 0.9])
"""Parts of the capital that are staked, side by side: small ones find small excesses, large ones large ones fast."""


class MeansAbove:
    """Tests of many series of values at least 0 side by side: does the mean of one stay at or below its limit?

    The hypothesis of a series is that, whatever came before, the next value has at most the limit as its mean. Nothing
    else is assumed: not independence, not a distribution, not that the values are alike over time.

    A bettor who stakes the part b of a capital at even odds on an excess has 1 + b (x / limit - 1) times the capital
    after the value x, which is no more on average where the hypothesis holds (Waudby-Smith and Ramdas 2023, arXiv
    2010.09686, section 4). Since an excess may begin at any time, a bettor with the capital 1 / (s (s + 1)) enters
    before each value s (Shin, Ramdas and Rinaldo 2023, arXiv 2203.03532, section 2, with weights that sum to 1 in place
    of a bound on the run length). What all of them have, together with the capital of those still to come, is the
    e-value of the series.

    Args:
        series: Their number.
    """

    def __init__(self, series: int) -> None:
        self._seen = np.zeros(series, dtype=np.int64)
        self._capital = np.zeros((series, len(_BETS)))

    def update(self, values: Sequence[float] | NDArray[np.float64], limits: Sequence[float] | float) -> None:
        """Take in one value of each series; NaN: none, and the series stays as it is.

        Args:
            values: At least 0, shape (series,). One that is infinite counts as a million times the limit.
            limits: Of the means, above 0; may differ from value to value, where what came before decides them.
        """
        ratio = np.minimum(np.asarray(values, dtype=np.float64) / limits, 1e6)
        here = ~np.isnan(ratio)
        seen = self._seen[here]
        entering = 1.0 / ((seen + 1.0) * (seen + 2.0))
        won = 1.0 + _BETS * (ratio[here, None] - 1.0)
        # Beyond any use as evidence, and far from what a float holds.
        self._capital[here] = np.minimum((self._capital[here] + entering[:, None]) * won, 1e150)
        self._seen[here] += 1

    def e_values(self) -> NDArray[np.float64]:
        """Evidence against the hypothesis of each series, shape (series,); at first 1."""
        still_to_come = 1.0 / (self._seen + 1.0)
        found: NDArray[np.float64] = self._capital.mean(1) + still_to_come
        return found

    def forget(self, series: int) -> None:
        """Begin a series again, where its alarm was dealt with."""
        self._seen[series], self._capital[series] = 0, 0.0

    def state(self) -> dict[str, Any]:
        """What ``restore`` takes, of plain lists."""
        return {"seen": self._seen.tolist(), "capital": self._capital.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: It is of another number of series.
        """
        seen, capital = np.array(state["seen"], dtype=np.int64), np.array(state["capital"], dtype=np.float64)
        if seen.shape != self._seen.shape or capital.shape != self._capital.shape:
            raise ValueError(f"The state is of {len(seen)} series, and these are {len(self._seen)}.")
        self._seen, self._capital = seen, capital


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

"""What i.i.d. Gaussian data with n values per channel gives: the reference for all measurements.

For n values of variance 1, n times the batch variance is chi-squared with n - 1 degrees of freedom. With exact
running statistics, E[r] = e_n = sqrt(2/n) Gamma(n/2) / Gamma((n-1)/2) and D = 2 (1 - e_n) = 3/(2n) + 7/(16n^2) + ...
Of statistics over N values that the n are part of, e_n / e_N takes the place of e_n: their shares of the sum of squares
around the mean are beta-distributed. All functions accept real n > 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from bnprobe.records import Interval

_SERIES_FROM = 1000.0
"""Above this n the two-term series has a relative error below 1e-6, and gamma functions would lose precision."""

_ROUNDS = 8
"""Each leaves at most a 16th of the error of n_eq."""

R_MAX = 3.0
D_MAX = 5.0
"""Final clipping limits of Batch Renorm (Ioffe 2017, section 4.1)."""


def mismatch_iid(n: float, population: float = math.inf) -> float:
    """D for n i.i.d. Gaussian values (dimensionless); tends to 2 as n tends to 1.

    Args:
        n: Values in a batch.
        population: Values that the running statistics were taken of, those n among them.
    """
    if population < math.inf:
        return 2.0 - 2.0 * (1.0 - mismatch_iid(n) / 2) / (1.0 - mismatch_iid(population) / 2)
    if n >= _SERIES_FROM:
        return 1.5 / n + 0.4375 / n**2
    if n <= 1.0:
        return 2.0
    log_e = math.lgamma(n / 2) - math.lgamma((n - 1) / 2) + 0.5 * math.log(2 / n)
    return -2.0 * math.expm1(log_e)


def equivalent_batch_size(mismatch: float, population: float = math.inf) -> float | None:
    """Equivalent batch size n_eq: the n for which i.i.d. Gaussian values give D = ``mismatch``.

    Args:
        mismatch: D.
        population: As in `mismatch_iid`.

    Returns:
        A number of values, at least 1 (any D of 2 or more gives 1); None for D = 0, which no finite batch gives.
    """
    if population < math.inf:
        mismatch = 2.0 - 2.0 * (1.0 - mismatch / 2) * (1.0 - mismatch_iid(population) / 2)
    if mismatch <= 0.0:
        return None
    if mismatch >= 2.0:
        return 1.0
    if mismatch <= mismatch_iid(_SERIES_FROM):
        return (math.sqrt(2.25 + 1.75 * mismatch) + 1.5) / (2 * mismatch)  # the root without cancellation
    # What n exceeds 1.5 / D by hardly varies: from 0.25 at n = 1 to 0.29 for large n.
    excess = 0.29
    for _ in range(_ROUNDS):
        n = 1.5 / mismatch + excess
        excess = n - 1.5 / mismatch_iid(n)
    return 1.5 / mismatch + excess


def clipped_r_iid(n: float, r_max: float = R_MAX) -> float:
    """P(r outside [1/r_max, r_max]) for n i.i.d. Gaussian values; n r^2 is chi-squared with n - 1 degrees."""
    from scipy.special import chdtr, chdtrc  # scipy.stats takes half a second to import

    if n <= 1.0:
        return 1.0
    if n == math.inf:
        return 0.0
    below, above = chdtr(n - 1, n / r_max**2), chdtrc(n - 1, n * r_max**2)
    return float(below + above)


def clipped_d_iid(n: float, d_max: float = D_MAX) -> float:
    """P(|d| > d_max) for n i.i.d. Gaussian values; d is normal with variance 1/n."""
    return math.erfc(d_max * math.sqrt(n / 2.0))


def standing(intervals: Sequence[Interval], limit: float) -> Literal["flagged", "undecided", "clean"]:
    """Classify a layer by the intervals of its mismatch on the measured paths and one limit.

    Flagged: on at least one path the lower end exceeds the limit. Clean: on no path does the upper end exceed it.
    Undecided: anything else.
    """
    if any(not low <= limit for low, _ in intervals):  # also NaN: a layer that overflows is not clean
        return "flagged"
    if any(high is None or high > limit for _, high in intervals):
        return "undecided"
    return "clean"

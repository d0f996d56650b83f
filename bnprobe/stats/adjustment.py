"""Location and scale of batches put right: ComBat (Johnson, Li & Rabinovic 2007, Biostatistics 8:118)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from bnprobe.stats.batch_effects import CONSTANT, Array, Design, fit


@dataclass(frozen=True)
class Adjusted:
    """Values with the batches' location and scale put right.

    Attributes:
        values: Adjusted; missing ones stay missing.
        location: What is taken from a batch, in standard deviations within batches; NaN where it has no values.
        scale: What its standard deviation is divided by.
        left: Features that are left as they are: constant, constant within a batch, or of too few values.
        mean_only: Batches of which the location alone is adjusted.
        shrunk: Whether the estimates of a batch lean on each other, for which it takes two features.
    """

    values: Float[Array, "rows features"]
    location: Float[Array, "batches features"]
    scale: Float[Array, "batches features"]
    left: Bool[Array, " features"]
    mean_only: Bool[Array, " batches"]
    shrunk: bool


CONVERGED = 1e-4
"""Where the iteration ends, as in ComBat: the largest relative change of a batch's estimates."""

_MOST_ROUNDS = 10_000


def adjust(
    values: Float[Array, "rows features"],
    design: Design,
    reference: int | None = None,
    mean_only: bool = False,
    correction: int = 1,
) -> Adjusted:
    """Parametric empirical Bayes adjustment: ComBat (Johnson, Li & Rabinovic 2007, Biostatistics 8:118, section 3.1).

    A batch's location (normal prior) and variance (inverse gamma prior) in each feature lean on those in the others.
    The effects of the covariates stay.

    Args:
        values: The table.
        design: Not confounded.
        reference: The batch to which the others are brought, and which stays as it is; None: to the mean of all rows.
        mean_only: Leave the scale as it is. So it is with a batch of one row, anyway.
        correction: What variances over rows and features divide by, less than their number: 1 as in ComBat of the R
            package sva and neuroCombat, 0 as in inmoose.
    """
    found = fit(values, design)
    counts, squares = found.counts, found.squares
    with np.errstate(divide="ignore", invalid="ignore"):
        if reference is None:
            grand = (counts * np.nan_to_num(found.centre)).sum(0) / counts.sum(0)
            variance = squares.sum(0) / counts.sum(0)
        else:
            grand, variance = found.centre[reference], squares[reference] / counts[reference]
        std = np.sqrt(variance)
        shift = (found.centre - grand) / std
        own = squares / variance
        spread = own / (counts - correction)
    level = np.maximum(np.nanmax(np.abs(values), axis=0, initial=0.0), np.finfo(float).tiny)
    flat = (counts > 1) & (
        (squares <= counts * np.square(CONSTANT * level)) | (_ranges(values, design) <= CONSTANT * level)
    )
    left = ~found.known | ~(variance > 0) | flat.any(0) | np.isnan(grand)
    location, scale = np.full_like(shift, np.nan), np.ones_like(shift)
    usable = ~left
    for batch in range(len(design.batches)):
        if batch == reference:
            location[batch] = 0.0
            continue
        here = usable & (counts[batch] > 0)
        alone = mean_only | (counts[batch, here] < 2)
        of_shift = Prior.of(shift[batch, here], correction)
        location[batch, here] = of_shift.mean_alone(shift[batch, here])
        several = np.flatnonzero(here)[~alone]
        if len(several):
            location[batch, several], scale[batch, several] = _shrunk(
                shift[batch, several],
                spread[batch, several],
                own[batch, several],
                counts[batch, several],
                correction,
                of_shift,
            )
    single = (counts[:, usable].max(1, initial=0) < 2) if usable.any() else np.zeros(len(design.batches), bool)
    adjusted = np.array(values)
    back = np.sqrt(scale)
    rows = design.batch
    moved = (found.residual + ((shift - location) * std)[rows]) / back[rows]
    moved += values - found.residual + (grand - found.centre)[rows]
    kept = usable[None, :] & (np.ones(len(values), bool) if reference is None else rows != reference)[:, None]
    np.copyto(adjusted, moved, where=kept)
    return Adjusted(adjusted, location, back, left, single | mean_only, int(usable.sum()) > 1)


def _ranges(values: Float[Array, "rows features"], design: Design) -> Float[Array, "batches features"]:
    """How far the values of each batch are apart; NaN where there are none."""
    parts = [values[design.batch == batch] for batch in range(len(design.batches))]
    return np.array([np.fmax.reduce(part, axis=0) - np.fmin.reduce(part, axis=0) for part in parts])


@dataclass(frozen=True)
class Prior:
    """The normal prior of a batch's locations: their mean and variance over features; None: there is but one."""

    mean: float
    variance: float | None

    @classmethod
    def of(cls, shift: Float[Array, " features"], correction: int) -> Prior:
        """That of these estimates."""
        if len(shift) < 2:
            return cls(0.0, None)
        return cls(float(shift.mean()), float(shift.var(ddof=correction)))

    def posterior(self, shift: Array, counts: Array, variance: Array) -> Float[Array, " features"]:
        """Posterior means, given the variances of single values."""
        if self.variance is None:
            return shift
        weight = counts * self.variance
        found: Float[Array, " features"] = (weight * shift + variance * self.mean) / (weight + variance)
        return found

    def mean_alone(self, shift: Array) -> Float[Array, " features"]:
        """As ComBat has it where locations alone are adjusted."""
        return self.posterior(shift, np.ones_like(shift), np.ones_like(shift))


def _shrunk(
    shift: Float[Array, " features"],
    spread: Float[Array, " features"],
    squares: Float[Array, " features"],
    counts: Float[Array, " features"],
    correction: int,
    prior: Prior,
) -> tuple[Float[Array, " features"], Float[Array, " features"]]:
    """Posterior location and variance of a batch, each given the other, until they stay.

    The sum of squares around a location follows from that around the mean, so that no round reads the values. ComBat's
    relative changes have a sign, that of the old location; here too, else the rounds would not be as many.
    """
    mean, variance = float(spread.mean()), float(spread.var(ddof=correction)) if len(spread) > 1 else 0.0
    if prior.variance is None or variance <= 0:
        return prior.posterior(shift, counts, spread), spread
    shape, rate = 2 + mean**2 / variance, mean + mean**3 / variance
    location, scale = shift, spread
    for _ in range(_MOST_ROUNDS):
        new = prior.posterior(shift, counts, scale)
        wide = (0.5 * (squares + counts * np.square(shift - new)) + rate) / (0.5 * counts + shape - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            changes = (np.abs(new - location) / location, np.abs(wide - scale) / scale)
        location, scale = new, wide
        if max(np.nanmax(change) for change in changes) <= CONVERGED:
            break
    return location, scale

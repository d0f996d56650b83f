"""Batch effects in a table of measurements: which batches and features differ, and by how much.

A row is a sample, a column a feature, and every row belongs to a batch. With covariates, a value is the effect of its
batch, plus those of the covariates, plus a residual; without their effects it is what a layer would normalize: the map
between normalizing by a batch and by the population is that of `bnprobe.stats.moments`.

Missing values are NaN: a feature is fitted to the rows that have it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from bnprobe.numbers import joined, listed
from bnprobe.stats.composition import false_discovery_rates
from bnprobe.stats.moments import corrections

Array = np.ndarray

DEALT = 199
"""Tables in which rows are dealt to the batches at random."""

_DEALT_VALUES = 100_000
"""Values of such a table: of a larger one so many features are drawn."""

_LEAST_FEATURES = 8

_DEPENDENT = 1e-8
"""A covariate of which less than this part is left within the batches is determined by them."""

CONSTANT = 1e-13
"""Values that differ by less, relative to their size, are the same but for rounding."""

SMALLEST = 1e-140
"""Of values that differ by less the squares are not exact."""

_LEAST_ROWS = 3
"""Rows of a batch that say something of its scale: two are as far from their median, and one is not at all."""

_RIDGE = 1e-12
"""Added to products of orthonormal columns, so that one of which nothing is left within the batches has no effect."""

_NO_EPS = 1e-12
"""What stands for eps, in units of the population's variance: nothing, but a batch of equal values has D = d^2."""


# --- The design -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Covariate:
    """What a row has besides its batch.

    Attributes:
        name: Its column.
        values: Numbers, or places in ``levels``.
        levels: Of a categorical one, the first of which the others are compared with; None: it is a number.
    """

    name: str
    values: Float[Array, " rows"] | Int[Array, " rows"]
    levels: tuple[str, ...] | None = None

    def columns(self) -> tuple[Float[Array, "rows columns"], tuple[str, ...]]:
        """What it adds to the design, and the names of these columns."""
        if self.levels is None:
            return self.values[:, None].astype(np.float64), (self.name,)
        one_hot = self.values[:, None] == np.arange(1, len(self.levels))
        return one_hot.astype(np.float64), tuple(f"{self.name} {level}" for level in self.levels[1:])


@dataclass(frozen=True)
class Design:
    """What the rows of a table are.

    Attributes:
        name: The column that says the batch.
        batches: Names of the batches.
        batch: The batch of each row, a place in ``batches``; each occurs.
        covariates: What else is known of a row.
    """

    name: str
    batches: tuple[str, ...]
    batch: Int[Array, " rows"]
    covariates: tuple[Covariate, ...] = ()

    @property
    def one_hot(self) -> Float[Array, "rows batches"]:
        """A column for each batch."""
        made: Float[Array, "rows batches"] = (self.batch[:, None] == np.arange(len(self.batches))).astype(np.float64)
        return made

    @property
    def columns(self) -> Float[Array, "rows columns"]:
        """All columns of the covariates, each around its mean, in units of its standard deviation."""
        made = [covariate.columns()[0] for covariate in self.covariates]
        joint = np.concatenate(made, 1) if made else np.empty((len(self.batch), 0))
        joint = joint - joint.mean(0)
        spread = joint.std(0)
        scaled: Float[Array, "rows columns"] = joint / np.where(spread > 0, spread, 1.0)
        return scaled

    def confounding(self) -> str | None:
        """Why effects of covariates cannot be told from those of batches, or of each other; None if they can.

        A sentence that names the covariates and the batches.
        """
        centred = self.columns
        within = _within(centred, self.one_hot)
        start = 0
        for covariate in self.covariates:
            made, names = covariate.columns()
            block = slice(start, start + made.shape[1])
            if made.shape[1] == 0 or not np.ptp(made, axis=0).all():
                return f"{covariate.name} has one value in all rows"
            if _rank(within[:, block]) < len(names):
                return self._same_as_batch(covariate)
            if _rank(centred[:, : block.stop]) < block.stop:
                return self._combination(centred[:, : block.stop], ())
            if _rank(within[:, : block.stop]) < block.stop:
                return self._combination(within[:, : block.stop], (self.name,))
            start = block.stop
        rows, needed = len(self.batch), len(self.batches) + centred.shape[1]
        if rows <= needed:
            return f"{rows} rows are too few for the effects of {len(self.batches)} batches and of the covariates"
        return None

    def left_over(self) -> list[tuple[str, float]]:
        """The part of each covariate's variance that batches and other covariates leave; the least of any levels.

        One over it is the variance inflation factor. The design is not confounded.
        """
        columns, parts = self.columns, []
        place = np.repeat(range(len(self.covariates)), [len(each.columns()[1]) for each in self.covariates])
        for number, covariate in enumerate(self.covariates):
            own, others = (_basis(columns[:, each]) for each in (place == number, place != number))
            beside = _basis(_within(others, self.one_hot))
            left = _within(own, self.one_hot)
            left = left - beside @ (beside.T @ left)
            parts.append((covariate.name, float(np.square(np.linalg.svd(left, compute_uv=False).min()))))
        return parts

    def _same_as_batch(self, covariate: Covariate) -> str:
        if covariate.levels is None:
            return f"{covariate.name} has one value in each {self.name}, so that it cannot be told from {self.name}"
        seen = [np.unique(covariate.values[self.batch == batch]) for batch in range(len(self.batches))]
        if all(len(levels) == 1 for levels in seen):
            pairs = [
                f"{batch}: {covariate.levels[levels[0]]}" for batch, levels in zip(self.batches, seen, strict=True)
            ]
            same = len({int(levels[0]) for levels in seen}) == len(self.batches)
            what = "is the same as" if same else "has one value in each"
            return f"{covariate.name} {what} {self.name} ({listed(pairs, 4)})"
        group, levels = self._apart(seen)
        batches = listed([self.batches[batch] for batch in group], 4)
        values = listed([covariate.levels[level] for level in sorted(levels)], 4)
        return (
            f"{covariate.name} is {values} in {self.name} {batches} and nowhere else, so that this difference cannot be"
            f" told from that of {self.name}"
        )

    def _apart(self, seen: Sequence[Int[Array, " levels"]]) -> tuple[list[int], set[int]]:
        """The smallest group of batches that has no level in common with the others, and its levels."""
        groups: list[tuple[set[int], set[int]]] = []
        for batch, found in enumerate(seen):
            batches, levels = {batch}, set(found.tolist())
            apart = []
            for group in groups:
                if group[1] & levels:
                    batches, levels = batches | group[0], levels | group[1]
                else:
                    apart.append(group)
            groups = [*apart, (batches, levels)]
        batches, levels = min(groups, key=lambda group: len(group[0]))
        return sorted(batches), levels

    def _combination(self, columns: Float[Array, "rows columns"], with_: tuple[str, ...]) -> str:
        """Which columns depend on each other."""
        weights = np.linalg.svd(columns)[2][-1]
        names = [name for covariate in self.covariates for name in covariate.columns()[1]]
        involved = [name for name, weight in zip(names, weights, strict=False) if abs(weight) > _DEPENDENT]
        known = joined([*with_, *involved[:-1]])
        return f"{involved[-1]} follows from {known}, so that its effect cannot be told from theirs"


def _within(
    values: Float[Array, "rows columns"], one_hot: Float[Array, "rows batches"]
) -> Float[Array, "rows columns"]:
    """The values around the means of their batches."""
    counts = one_hot.sum(0)
    means = (one_hot.T @ values) / np.maximum(counts, 1)[:, None]
    around: Float[Array, "rows columns"] = values - one_hot @ means
    return around


def _rank(columns: Float[Array, "rows columns"]) -> int:
    """Of columns that had unit variance before something was taken out of them."""
    if columns.shape[1] == 0:
        return 0
    return int(np.linalg.matrix_rank(columns, tol=_DEPENDENT * math.sqrt(len(columns))))


# --- The fit ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Least squares: effects of batches and covariates on each feature.

    Attributes:
        counts: Values of each batch.
        centre: Means of the batches, without the effects of the covariates; NaN for a batch without values.
        residual: What neither batch nor covariates explain; NaN where the value is missing.
        squares: Sum of the squared residuals of each batch.
        null: Sum of the squared residuals where all rows are one batch.
        freedom: Degrees of freedom of the residuals.
        effects: Of the covariates' columns together, degrees of freedom taken.
        known: Whether the feature varies, and its rows tell the effects apart.
    """

    counts: Float[Array, "batches features"]
    centre: Float[Array, "batches features"]
    residual: Float[Array, "rows features"]
    squares: Float[Array, "batches features"]
    null: Float[Array, " features"]
    freedom: Float[Array, " features"]
    effects: int
    known: Bool[Array, " features"]

    @property
    def present(self) -> Int[Array, " features"]:
        """Batches that have values."""
        number: Int[Array, " features"] = (self.counts > 0).sum(0)
        return number


def fit(values: Float[Array, "rows features"], design: Design) -> Fit:
    """Fit batches and covariates to every feature."""
    batches, features = len(design.batches), values.shape[1]
    one_hot, covariates = design.one_hot, design.columns
    counts, squares = np.zeros((2, batches, features))
    centre = np.full((batches, features), np.nan)
    residual = np.full_like(values, np.nan)
    null, freedom = np.zeros((2, features))
    known = np.zeros(features, bool)
    for rows, columns in _patterns(values):
        whole = rows.all() and len(columns) == features
        part = values if whole else values[np.ix_(rows, columns)]
        here, beside = one_hot[rows], covariates[rows]
        number = here.sum(0)
        have = number > 0
        counts[:, columns] = number[:, None]
        if have.sum() == 0:
            continue
        share = np.divide(here, number, out=np.zeros_like(here), where=have)
        mean = part.mean(0)
        level = np.maximum(np.abs(part).max(0), np.finfo(float).tiny)
        about = part - mean
        means = share.T @ about
        within = about - here @ means
        beside = beside - beside.mean(0)
        inner = beside - here @ (share.T @ beside)
        told_apart = _rank(inner) == inner.shape[1]
        if inner.shape[1] and told_apart:
            effects = np.linalg.pinv(inner) @ within
            within = within - inner @ effects
            means = means - (share.T @ beside) @ effects
            about = about - beside @ (np.linalg.pinv(beside) @ about)
        squared = here.T @ np.square(within)
        total = np.square(about).sum(0)
        varies = total > len(part) * np.square(np.maximum(CONSTANT * level, SMALLEST))
        centre[np.ix_(have, columns)] = (means + mean)[have]
        squares[:, columns] = squared
        null[columns] = total
        freedom[columns] = len(part) - have.sum() - inner.shape[1]
        known[columns] = varies & told_apart & (freedom[columns] > 0)
        if whole:
            residual = within
        else:
            residual[np.ix_(rows, columns)] = within
    return Fit(counts, centre, residual, squares, null, freedom, covariates.shape[1], known)


def _patterns(
    values: Float[Array, "rows features"],
) -> Iterator[tuple[Bool[Array, " rows"], Int[Array, " some"]]]:
    """Features by the rows that have them; almost always there is one such pattern."""
    missing = np.isnan(values)
    some = missing.any(0)
    if not some.all():
        yield np.ones(len(values), bool), np.flatnonzero(~some)
    if not some.any():
        return
    columns = np.flatnonzero(some)
    packed = np.packbits(missing[:, columns], axis=0)
    _, first, which = np.unique(packed, axis=1, return_index=True, return_inverse=True)
    which = which.ravel()
    for number, place in enumerate(first):
        yield ~missing[:, columns[place]], columns[which == number]


# --- What differs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tests:
    """Tests of each feature: are all batches alike?

    Attributes:
        location: P-value of the F-test of batches, given the covariates.
        scale: P-value of Brown & Forsythe's test of the residuals (1974): an analysis of variance of their distances
            from the medians of the batches.
        rate: The false discovery rate at which a feature differs in one or the other.
        explained: Share of the variance that batches explain, given the covariates, beyond what chance would.
    """

    location: Float[Array, " features"]
    scale: Float[Array, " features"]
    rate: Float[Array, " features"]
    explained: Float[Array, " features"]


def test_features(found: Fit, design: Design) -> Tests:
    """Test every feature; p-values of what is not known are 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = found.present - 1
        left = found.squares.sum(0)
        ratio = ((found.null - left) / steps) / (left / found.freedom)
        location = _tail(ratio, steps, found.freedom)
        whole = found.null / (found.freedom + steps)
        explained = np.where(found.known & (steps > 0), 1 - (left / found.freedom) / whole, 0.0)
    scale = _scale_test(found.residual, design)
    location, scale = np.where(found.known, location, 1.0), np.where(found.known, scale, 1.0)
    either = np.minimum(2 * np.minimum(location, scale), 1.0)
    rate = np.ones_like(either)
    if found.known.any():
        rate[found.known] = false_discovery_rates(torch.from_numpy(either[found.known])).numpy()
    return Tests(location, scale, rate, np.clip(explained, 0.0, 1.0))


def _tail(ratio: Array, above: Array, below: Array) -> Float[Array, " features"]:
    from scipy.special import fdtrc  # scipy.stats takes half a second to import

    found = fdtrc(np.maximum(above, 1), np.maximum(below, 1), np.maximum(ratio, 0.0))
    return np.where((above > 0) & ~np.isnan(ratio), found, 1.0)


def _distances(residual: Float[Array, "rows features"], design: Design) -> Float[Array, "rows features"]:
    """How far residuals are from the median of their batch; NaN where missing."""
    away = np.empty_like(residual)
    for batch in range(len(design.batches)):
        rows = design.batch == batch
        part = residual[rows]
        gaps = np.isnan(part)
        if not gaps.any():
            middle = np.median(part, axis=0)
        else:
            middle = np.zeros(part.shape[1])
            some = ~gaps.all(0)
            middle[some] = np.nanmedian(part[:, some], axis=0)
        away[rows] = np.abs(part - middle)
    return away


def _spreads(residual: Float[Array, "rows features"], design: Design) -> tuple[Float[Array, "batches features"], ...]:
    """Number, sum and sum of squares of the distances of each batch; 0 where they are too few."""
    away, one_hot = _distances(residual, design), design.one_hot
    there = ~np.isnan(away)
    counts = one_hot.T @ there
    sums, squares = (one_hot.T @ np.where(there, each, 0.0) for each in (away, np.square(away)))
    counts, sums, squares = (np.where(counts >= _LEAST_ROWS, each, 0.0) for each in (counts, sums, squares))
    return counts, sums, squares


def _scale_test(residual: Float[Array, "rows features"], design: Design) -> Float[Array, " features"]:
    counts, sums, squares = _spreads(residual, design)
    number, groups = counts.sum(0), (counts > 0).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        of_batches = np.where(counts > 0, np.square(sums) / counts, 0.0).sum(0)
        between = of_batches - np.square(sums.sum(0)) / number
        within = squares.sum(0) - of_batches
        rounding = _NO_EPS * squares.sum(0)
        between, within = (np.where(each > rounding, each, 0.0) for each in (between, within))
        ratio = (between / (groups - 1)) / (within / (number - groups))
    return _tail(ratio, groups - 1, number - groups)


# --- Which batches are off --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Which batches are off, and which agree.

    Attributes:
        off: Batches that differ from the others.
        population: The batches that agree, at least half of all and two; all where there are none such.
        agree: Whether there are such.
        expected: Mean of D over features of each batch, where rows are dealt to the batches at random.
        interval: 95% of such.
        p_value: How often one of the batches is as far off as this one, for its size, where rows are dealt at random.
    """

    off: Bool[Array, " batches"]
    population: Bool[Array, " batches"]
    agree: bool
    expected: Float[Array, " batches"]
    interval: Float[Array, "batches ends"]
    p_value: Float[Array, " batches"]


def judge(
    values: Float[Array, "rows features"],
    design: Design,
    known: Bool[Array, " features"],
    level: float = 0.05,
    seed: int = 0,
) -> Judged:
    """Find the batches that are not like the others.

    Rows, without what the covariates explain, are dealt to the batches at random (Freedman & Lane 1983), whole, so
    that features stay as correlated and as heavy-tailed as they are. A batch is off where its D, over what it comes to
    on average in such tables, is larger than the largest of all batches in all but ``level`` of them. That of a batch
    without values of some features varies more; what it has above the average counts less, by the root of their number.
    An outlying batch shifts the population, and with it the D of all: so the farthest are taken out, and the rest is
    judged again.

    Args:
        values: The table.
        design: Not confounded.
        known: Features that can be judged; at least one.
        level: How probable it is that a batch is called off where all are alike.
        seed: Of the random tables.
    """
    random = np.random.default_rng(seed)
    number = len(design.batches)
    chosen = _drawn(len(values), known, random)
    features = (design.one_hot.T @ ~np.isnan(values[:, chosen]) > 0).sum(1)
    precise = np.sqrt(features / features.max())
    active = np.ones(number, bool)
    off = np.zeros(number, bool)
    first: Bool[Array, " batches"] | None = None
    expected, p_value, interval = np.zeros(number), np.ones(number), np.zeros((number, 2))
    while active.sum() > 1:
        rows = active[design.batch]
        here = np.flatnonzero(active)
        tables = _deal(
            values[np.ix_(rows, chosen)], np.searchsorted(here, design.batch[rows]), design.columns[rows], random
        )
        mean = np.maximum(tables[1:].mean(0), np.finfo(float).tiny)
        relative = (tables / mean - 1) * precise[here]
        largest = np.sort(relative[1:].max(1))
        limit = largest[min(math.ceil((1 - level) * (len(largest) + 1)), len(largest)) - 1]
        expected[here], interval[here] = mean, np.quantile(tables[1:], (0.025, 0.975), axis=0).T
        p_value[here] = (1 + (largest >= relative[0][:, None]).sum(1)) / (1 + len(largest))
        found = relative[0] > limit
        if first is None:
            first = np.zeros(number, bool)
            first[here[found]] = True
        if not found.any():
            break
        excess = np.where(found, tables[0] - mean, -np.inf)
        farthest = here[excess >= excess.max() / 2]
        active[farthest], off[farthest] = False, True
        if active.sum() < max(2, number / 2):
            break
    agree = bool(active.sum() >= max(2, number / 2))
    if agree or first is None:
        return Judged(off, active, agree, expected, interval, p_value)
    return Judged(first, np.ones(number, bool), False, expected, interval, p_value)


def _drawn(rows: int, known: Bool[Array, " features"], random: np.random.Generator) -> Int[Array, " some"]:
    """Features to deal: those that can be judged, so many as are not too many."""
    among = np.flatnonzero(known)
    most = max(_LEAST_FEATURES, _DEALT_VALUES // rows)
    return among if len(among) <= most else np.sort(random.choice(among, most, replace=False))


def _deal(
    values: Float[Array, "rows features"],
    batch: Int[Array, " rows"],
    covariates: Float[Array, "rows columns"],
    random: np.random.Generator,
) -> Float[Array, "tables batches"]:
    """D of each batch: as it is, and in tables that are dealt at random.

    What a row lacks it lacks wherever it is dealt to, so that a batch gets more or fewer values of a feature than it
    has, beside other covariates. So D of a dealt table is taken times what it comes to by chance where the values are,
    over what it comes to where they have been dealt to. The mean is over features, by the values that the batch has.
    """
    basis = _basis(covariates)
    values = values[:, np.argsort(np.isnan(values).any(0), kind="stable")]  # those without gaps are the first
    left, there = _about(values, basis)
    spread = np.sqrt(np.square(left).sum(0) / np.maximum(there.sum(0), 1))
    left, there = left[:, spread > 0] / spread[spread > 0], there[:, spread > 0]
    number = int(batch.max()) + 1
    if not left.shape[1]:
        return np.zeros((1 + DEALT, number))
    order = np.lexsort((*left.T[::-1], batch))  # so that the order of the rows does not matter
    left, there, basis = left[order], there[order], basis[order]
    first = np.searchsorted(batch[order], np.arange(number))
    own = np.add.reduceat(there, first)
    whole = int(there.all(0).sum())
    fixed, by_chance = _Given.of(np.ones((len(left), 1)), basis, first), _Given.of(there, basis, first).by_chance()
    found: list[Float[Array, "some batches"]] = []
    together = max(1, _DEALT_VALUES * 10 // own.size)
    for start in range(0, 1 + DEALT, together):
        moments = []
        for table in range(start, min(start + together, 1 + DEALT)):
            rows = random.permutation(len(left)) if table else np.arange(len(left))
            dealt, counts, weights = fixed.without(left[rows, :whole]), own, own
            if whole < left.shape[1]:
                moved = _Given.of(there[rows, whole:], basis, first)
                dealt = np.concatenate([dealt, moved.without(left[rows, whole:])], 1)
                counts = np.concatenate([own[:, :whole], moved.counts], 1)
                here, there_now = (own * by_chance)[:, whole:], moved.by_chance()
                some = (moved.counts > 0) & (there_now > 0)
                ratio = np.divide(here, there_now, out=np.zeros_like(here), where=some)
                weights = np.concatenate([own[:, :whole], ratio], 1)
            sums, squares = (np.add.reduceat(each, first) for each in (dealt, np.square(dealt)))
            mean, square = (each / np.maximum(counts, 1) for each in (sums, squares))
            total = counts.sum(0, keepdims=True)
            centre, raw = (each.sum(0, keepdims=True) / total for each in (sums, squares))
            variances = (np.maximum(each, 0.0) for each in (square - np.square(mean), raw - np.square(centre)))
            moments.append((mean, centre, *variances, weights, own * (counts > 0)))
        mean, centre, variance, around, weights, present = (
            np.concatenate(each, 1) for each in zip(*moments, strict=True)
        )
        mismatch = np.nan_to_num(_mismatch(mean, variance, centre[0], around[0])[2])
        weighted, sizes = (each.reshape(number, len(moments), -1).sum(2).T for each in (weights * mismatch, present))
        found.append(weighted / np.maximum(sizes, 1))
    return np.concatenate(found)


def _about(
    values: Float[Array, "rows features"], basis: Float[Array, "rows columns"]
) -> tuple[Float[Array, "rows features"], Float[Array, "rows features"]]:
    """What covariates leave of values, if all rows are one batch, 0 where missing; and 1 where they are not missing."""
    there = (~np.isnan(values)).astype(np.float64)
    number = np.maximum(there.sum(0), 1)
    left = np.nan_to_num(values - np.nansum(values, axis=0) / number)
    whole = there.all(0)
    for block, beside in ((whole, np.ones((len(values), 1))), (~whole, there[:, ~whole])):
        left[:, block] = _Given.of(beside, basis, np.zeros(1, int)).without(left[:, block])
    return left - there * (left.sum(0) / number), there


@dataclass(frozen=True)
class _Given:
    """Covariates beside the values of each feature, given the batches; of features without gaps, one for all.

    Attributes:
        there: 1 where there is a value, 0 where it is missing.
        basis: Orthonormal columns of the covariates.
        first: The first row of each batch; rows of a batch are neighbours.
        counts: Values of each batch.
        means: Of the columns, in each batch.
        inverse: That of the columns' products within the batches.
    """

    there: Float[Array, "rows features"]
    basis: Float[Array, "rows columns"]
    first: Int[Array, " batches"]
    counts: Float[Array, "batches features"]
    means: Float[Array, "columns batches features"]
    inverse: Float[Array, "features columns columns"]

    @classmethod
    def of(
        cls, there: Float[Array, "rows features"], basis: Float[Array, "rows columns"], first: Int[Array, " batches"]
    ) -> _Given:
        """Those of values that are there."""
        number = basis.shape[1]
        counts = np.add.reduceat(there, first)
        sums = [np.add.reduceat(there * column[:, None], first) for column in basis.T]
        means = np.reshape(sums, (number, *counts.shape)) / np.maximum(counts, 1)
        products = (basis[:, :, None] * basis[:, None, :]).reshape(len(basis), -1)
        raw = (there.T @ products).reshape(there.shape[1], number, number)
        within = raw - np.einsum("ibf,jbf,bf->fij", means, means, counts)
        return cls(there, basis, first, counts, means, np.linalg.inv(within + _RIDGE * np.eye(number)))

    def without(self, values: Float[Array, "rows features"]) -> Float[Array, "rows features"]:
        """Values without the effects of the covariates, given the batches; missing ones are 0, and stay so."""
        sums = np.add.reduceat(values, self.first)
        products = values.T @ self.basis - (self.means * sums).sum(1).T
        effects = (self.inverse @ products[:, :, None])[:, :, 0]
        left: Float[Array, "rows features"] = values - self.there * (self.basis @ effects.T)
        return left

    def by_chance(self) -> Float[Array, "batches features"]:
        """What D comes to where all batches are alike: that of d, with the effects to be told apart, and that of r."""
        number = self.counts.sum(0)
        offset = self.means - (self.counts * self.means).sum(1, keepdims=True) / np.maximum(number, 1)
        apart = np.einsum("kbf,fkl,lbf->bf", offset, self.inverse, offset)
        found: Float[Array, "batches features"] = 1.5 / np.maximum(self.counts, 1) - 1.5 / np.maximum(number, 1) + apart
        return found


def _basis(columns: Float[Array, "rows columns"]) -> Float[Array, "rows some"]:
    """Orthonormal columns that span the given ones around their means."""
    vectors, sizes, _ = np.linalg.svd(columns - columns.mean(0), full_matrices=False)
    basis: Float[Array, "rows some"] = vectors[:, sizes > _DEPENDENT]
    return basis


# --- Figures of each batch and feature --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """The map between normalizing by a batch and by the population; NaN where there is none.

    Attributes:
        mean, std: Of the population, without the effects of the covariates; std is biased, and 0 where it is rounding.
        r, d, mismatch: As in `bnprobe.stats.moments.corrections`; r of a batch of one value is NaN.
        differs: Whether the batch differs, in location or scale, from the others that agree: in features that differ,
            so that of all such batches and features the expected part of wrong ones is the rate of the features
            (Benjamini & Bogomolov 2014).
    """

    mean: Float[Array, " features"]
    std: Float[Array, " features"]
    r: Float[Array, "batches features"]
    d: Float[Array, "batches features"]
    mismatch: Float[Array, "batches features"]
    differs: Bool[Array, "batches features"]


def figures(found: Fit, tests: Tests, judged: Judged, design: Design, level: float = 0.05) -> Figures:
    """r, d and D of each batch and feature against the batches that agree.

    Args:
        found: The fit.
        tests: Of the same fit.
        judged: Which batches agree.
        design: Its batches.
        level: The false discovery rate at which a feature differs.
    """
    inside = judged.population[:, None] * found.counts
    centre = np.nan_to_num(found.centre)
    with np.errstate(divide="ignore", invalid="ignore"):
        number = inside.sum(0)
        mean = (inside * centre).sum(0) / number
        away = np.square(centre - mean)
        variance = ((judged.population[:, None] * found.squares) + inside * away).sum(0) / number
        own = found.squares / found.counts
        rounding = np.square(CONSTANT) * np.maximum(np.square(mean), found.null)
        variance = np.where(variance > rounding, variance, 0.0)
    usable = found.known & (variance > 0)
    r, d, mismatch = _mismatch(found.centre, own, mean, np.where(usable, variance, np.nan))
    r = np.where(found.counts > 1, r, np.nan)
    p_values = _cells(found, judged, design)
    selected = usable & (tests.rate <= level)
    limit = level * selected.sum() / max(usable.sum(), 1) / len(design.batches)
    differs = selected & (np.nan_to_num(p_values, nan=1.0) <= limit)
    return Figures(mean, np.sqrt(variance), r, d, mismatch, differs)


def _mismatch(mean: Array, variance: Array, population_mean: Array, population_variance: Array) -> tuple[Array, ...]:
    """r, d and D of batches against a population."""
    given = (mean, variance, population_mean, population_variance, _NO_EPS * population_variance)
    found = corrections(*(torch.from_numpy(np.ascontiguousarray(each)) for each in given))
    return found.r.numpy(), found.d.numpy(), found.mismatch.numpy()


def _cells(found: Fit, judged: Judged, design: Design) -> Float[Array, "batches features"]:
    """P-values of each batch against the others that agree: twice the smaller one of location and scale."""
    from scipy.special import stdtr

    number, sums, spread = _spreads(found.residual, design)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_squares = np.where(number > 0, np.square(sums) / number, 0.0)
    p_values = np.ones_like(found.centre)
    order = np.argsort(design.batch, kind="stable")
    there = (~np.isnan(found.residual[order])).astype(np.float64)
    alike = there[:, :1] if (there == there[:, :1]).all() else there
    first = np.searchsorted(design.batch[order], np.arange(len(design.batches)))
    given = _Given.of(alike, _basis(design.columns)[order], first)
    centre = np.nan_to_num(found.centre)
    for batch in range(len(design.batches)):
        others = judged.population.copy()
        others[batch] = False
        own, rest = found.counts[batch], found.counts[others].sum(0)
        groups = (found.counts[others] > 0).sum(0) + (own > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = found.counts[others] / rest
            step = centre[batch] - (weight * centre[others]).sum(0)
            weight = given.counts[others] / given.counts[others].sum(0)
            offset = given.means[:, batch] - (weight * given.means[:, others]).sum(1)
            factor = 1 / own + 1 / rest + np.einsum("kf,fkl,lf->f", offset, given.inverse, offset)
            freedom = own + rest - groups - found.effects
            noise = (found.squares[batch] + found.squares[others].sum(0)) / freedom
            location = 2 * stdtr(freedom, -np.abs(step) / np.sqrt(noise * factor))
            own, rest = number[batch], number[others].sum(0)
            far = sums[batch] / own - sums[others].sum(0) / rest
            freedom = own + rest - (number[others] > 0).sum(0) - 1
            noise = (spread - mean_squares)[[*np.flatnonzero(others), batch]].sum(0) / freedom
            scale = 2 * stdtr(freedom, -np.abs(far) / np.sqrt(noise * (1 / own + 1 / rest)))
        scale = np.where(own > 0, scale, 1.0)
        p_values[batch] = np.minimum(2 * np.fmin(location, scale), 1.0)
    return p_values


# --- A picture of all rows --------------------------------------------------------------------------------------------


def projected(
    values: Float[Array, "rows features"], others: Sequence[Float[Array, "rows features"]] = ()
) -> tuple[list[Float[Array, "rows axes"]], tuple[float, float]]:
    """Rows on the two axes along which the first table varies most, and what part of its variance they are.

    Features are taken around their mean, in units of their standard deviation in the first table; missing values are
    average.

    Args:
        values: Features that vary.
        others: Further tables of the same rows and features, on the same axes.
    """
    mean, std = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    scaled = [np.nan_to_num((each - mean) / std) for each in (values, *others)]
    sizes, vectors = np.linalg.eigh(scaled[0] @ scaled[0].T)
    total = max(float(sizes.clip(0).sum()), np.finfo(float).tiny)
    first = vectors[:, ::-1][:, :2]
    first = first * np.where(first.max(0) >= -first.min(0), 1.0, -1.0)  # the sign is free
    root = np.sqrt(np.maximum(sizes[::-1][:2], np.finfo(float).tiny))
    axes = scaled[0].T @ (first / root)
    shares = [float(size) / total for size in sizes[::-1][:2].clip(0)]
    return [each @ axes for each in scaled], (shares[0], shares[1] if len(shares) > 1 else 0.0)

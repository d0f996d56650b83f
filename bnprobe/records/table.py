"""Batch effects in a table of measurements: which batches and features differ, and by how much."""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.records.base import SCHEMA_VERSION, Record, Tool
from bnprobe.records.document import Document


@dataclass(frozen=True)
class TableBatch(Record):
    """A batch against the population: the rows of the batches that agree.

    Attributes:
        rows: Rows of the table.
        off: Whether it differs from the batches that agree.
        mismatch: D, mean over the features, by the number of values that it has of each; None where it has none.
        equivalent_batch_size: n_eq: a batch of so many i.i.d. Gaussian rows has this D on average.
        expected: Mean D of a batch of its size, where rows are dealt to the batches at random.
        expected_interval: 95% of such.
        p_value: How often, where rows are dealt so, a batch is as far off for its size as this one.
        differing: Features, of those that differ, in which it differs from the others that agree.
        r: Its standard deviation over that of the population, in each feature; None where there is none.
        d: Its mean less that of the population, in standard deviations of the population, in each feature.
    """

    name: str
    rows: int
    off: bool
    mismatch: float | None
    equivalent_batch_size: float | None
    expected: float
    expected_interval: tuple[float, float]
    p_value: float
    differing: tuple[str, ...]
    r: tuple[float | None, ...]
    d: tuple[float | None, ...]


@dataclass(frozen=True)
class TableFeature(Record):
    """A feature: whether its batches differ.

    Attributes:
        values: Rows in which it is not missing.
        mean: Of the population, without the effects of the covariates.
        std: The same, biased.
        location: P-value of the F-test of batches, given the covariates.
        scale: P-value of the test of Brown and Forsythe, of the residuals.
        rate: The false discovery rate at which it differs in location or scale.
        differs: Whether that is small enough.
        explained: Part of its variance that batches explain, beyond chance.
    """

    name: str
    values: int
    mean: float
    std: float
    location: float
    scale: float
    rate: float
    differs: bool
    explained: float


@dataclass(frozen=True)
class SkippedFeature(Record):
    """A feature that could not be judged, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class TableAdjustment(Record):
    """The table with location and scale of the batches put right, as it was measured again.

    Attributes:
        output: The file.
        reference: The batch that the others were brought to; None: the mean of all.
        mean_only: Batches of which the location alone was adjusted.
        unchanged: Features that were left as they are.
        entangled: Covariates that all but follow from the batch or each other.
        shrunk: Whether estimates lean on those of the other features.
        explained: Part of the variance that batches explain now, beyond chance, mean over features.
        differing: Features that differ between batches now.
    """

    output: str
    reference: str | None
    mean_only: tuple[str, ...]
    unchanged: tuple[str, ...]
    entangled: tuple[str, ...]
    shrunk: bool
    explained: float
    differing: int


@dataclass(frozen=True)
class TableProjection(Record):
    """Rows on the two axes along which they vary most; of many rows some.

    Attributes:
        explained: Part of the variance along each axis.
        batches: The batch of each row, a place in the batches of the report.
        before: The rows as they are.
        after: The same rows adjusted, on the same axes; empty where nothing was adjusted.
    """

    explained: tuple[float, float]
    batches: tuple[int, ...]
    before: tuple[tuple[float, float], ...]
    after: tuple[tuple[float, float], ...]


@dataclass(frozen=True, repr=False)
class TableReport(Document):
    """Batch effects in a table of measurements.

    Attributes:
        data: The file, or what else it was.
        batch: The column that says the batch of a row.
        covariates: Columns whose effects were taken into account.
        fdr: False discovery rate of features, and probability that a batch is called off where all are alike.
        agree: Whether there are batches that agree: two, and half of all; if not, the population is all rows.
        population: Batches that agree.
        explained: Part of the variance that batches explain, beyond chance, mean over features.
        batches: In order of their names.
        features: In the order of the table: so are r and d of the batches.
        skipped: Features that could not be judged.
        adjusted: None where nothing was adjusted.
        projection: None where there are too few rows or features.
        notes: What else was found, a sentence each.

    Example:
        >>> import pandas as pd
        >>> rows = [(f"P{row % 3}", float(row % 5), float(row % 7) + 9 * (row % 3 == 2)) for row in range(60)]
        >>> report = bnprobe.table(pd.DataFrame(rows, columns=["plate", "calcium", "sodium"]), batch="plate")
        >>> [(batch.name, batch.off, batch.differing) for batch in report.batches]
        [('P0', False, ()), ('P1', False, ()), ('P2', True, ('sodium',))]
        >>> [feature.name for feature in report.features if feature.differs]
        ['sodium']
    """

    tool: Tool
    data: str
    batch: str
    covariates: tuple[str, ...]
    rows: int
    fdr: float
    agree: bool
    population: tuple[str, ...]
    explained: float
    batches: tuple[TableBatch, ...]
    features: tuple[TableFeature, ...]
    skipped: tuple[SkippedFeature, ...]
    adjusted: TableAdjustment | None
    projection: TableProjection | None
    notes: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION

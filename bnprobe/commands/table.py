"""``bnprobe table``: batch effects in a table of measurements, and the table without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from bnprobe._version import __version__
from bnprobe.errors import DataError, NothingToProbeError, UsageError
from bnprobe.files import refuse_input, require_new, write_all
from bnprobe.loading.table import Choice, Table, endings, read_table
from bnprobe.numbers import count, grouped, listed, percent
from bnprobe.records import (
    SkippedFeature,
    TableAdjustment,
    TableBatch,
    TableFeature,
    TableProjection,
    TableReport,
    Tool,
)
from bnprobe.stats.adjustment import Adjusted, adjust
from bnprobe.stats.batch_effects import (
    SMALLEST,
    Figures,
    Fit,
    Judged,
    figures,
    fit,
    judge,
    projected,
    test_features,
)
from bnprobe.stats.theory import equivalent_batch_size
from bnprobe.wording import from_python, nearest, option

FDR = 0.05
"""The false discovery rate, and the probability that a batch is called off for nothing."""

_LITTLE = 0.1
"""A covariate of which less than this part of its variance is left beside all else is hardly told apart from it: its
variance inflation factor is beyond 10, the usual limit."""

_MOST_ROWS, _MOST_FEATURES = 1_000, 2_000
"""What the picture of the rows is drawn of, at most."""


@dataclass(frozen=True)
class Adjusting:
    """How a table is adjusted.

    Attributes:
        output: The file that is written.
        reference: The batch that the others are brought to.
        mean_only: Leave the scale as it is.
        force: Whether the file may be replaced.
    """

    output: Path
    reference: str | None
    mean_only: bool
    force: bool

    @classmethod
    def of(cls, output: Path | None, reference: str | None, mean_only: bool, force: bool) -> Adjusting | None:
        """As options say; None where there is no file.

        Raises:
            UsageError: It is said how to adjust, and not where to.
        """
        if output is not None:
            return cls(output, reference, mean_only, force)
        if reference is not None or mean_only:
            given = option("--mean-only", True) if reference is None else option("--reference", reference)
            raise UsageError(f"{given} says how to adjust: give {option('--adjust', 'FILE')}, too.")
        return None


@from_python
def table(
    data: Any,
    *,
    batch: str,
    covariates: Sequence[str] = (),
    categorical: Sequence[str] = (),
    features: Sequence[str] = (),
    ignore: Sequence[str] = (),
    fdr: float = FDR,
    seed: int = 0,
    adjust: str | PathLike[str] | None = None,
    reference: str | None = None,
    mean_only: bool = False,
    force: bool = False,
) -> TableReport:
    """Say which batches of a table of measurements are off, and which features differ between batches.

    Args:
        data: The path of a file (.csv, .tsv, .parquet, .h5ad), a ``pandas.DataFrame`` or an ``anndata.AnnData``, with a
            row for each sample.
        batch: The column that says the batch of a row.
        covariates: Columns whose effects are no batch effects: numbers, or categories.
        categorical: Covariates that are categories, though they are numbers.
        features: Columns, or patterns such as "IL*"; none: all that hold numbers and are nothing else.
        ignore: Columns, or patterns, that are no features.
        fdr: False discovery rate of features, and probability that a batch is called off where all are alike.
        seed: Of the tables dealt at random.
        adjust: Write the table without batch effects to this file.
        reference: Adjust the other batches to this one.
        mean_only: Adjust the location alone, not the scale.
        force: Whether the file may be replaced.

    Raises:
        UsageError: A column does not exist, or a package is not installed.
        DataError: The table cannot be read, or the design is confounded: says where, and why.
        NothingToProbeError: No feature can be judged.

    Example:
        >>> import pandas as pd
        >>> rows = [(f"P{row % 3}", float(row % 5), float(row % 7) + 9 * (row % 3 == 2)) for row in range(60)]
        >>> report = bnprobe.table(pd.DataFrame(rows, columns=["plate", "calcium", "sodium"]), batch="plate")
        >>> report.batches[2].off, report.population
        (True, ('P0', 'P1'))
        >>> [round(d) for d in report.batches[2].d]
        [0, 4]
    """
    choice = Choice(batch, *map(_names, (covariates, categorical, features, ignore)))
    how = Adjusting.of(None if adjust is None else Path(adjust), reference, mean_only, force)
    return table_report(data, choice, how, fdr, seed)


@from_python
def adjust_table(
    data: Any,
    *,
    batch: str,
    covariates: Sequence[str] = (),
    categorical: Sequence[str] = (),
    features: Sequence[str] = (),
    ignore: Sequence[str] = (),
    reference: str | None = None,
    mean_only: bool = False,
) -> Any:
    """A table without the location and scale of its batches: parametric empirical Bayes, as ComBat.

    Args:
        data, batch, covariates, categorical, features, ignore, reference, mean_only: As `bnprobe.table` takes them.

    Returns:
        A ``pandas.DataFrame``, or an ``anndata.AnnData`` where ``data`` is one: a copy with the same columns in the
        same order, in which only the features have other values.

    Raises:
        UsageError: A column does not exist, or a package is not installed.
        DataError: The table cannot be read, or the design is confounded: says where, and why.

    Example:
        >>> import pandas as pd
        >>> rows = [(f"P{row % 3}", float(row % 5), float(row % 7) + 9 * (row % 3 == 2)) for row in range(60)]
        >>> frame = pd.DataFrame(rows, columns=["plate", "calcium", "sodium"])
        >>> adjusted = bnprobe.adjust_table(frame, batch="plate")
        >>> list(adjusted.columns), bool(adjusted["sodium"].groupby(frame["plate"]).mean().std() < 0.1)
        (['plate', 'calcium', 'sodium'], True)
    """
    read = _read(data, Choice(batch, *map(_names, (covariates, categorical, features, ignore))))
    found = adjust(read.values, read.design, _place(read, reference), mean_only)
    return read.replaced(found.values, found.left)


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Several, or one by itself."""
    return (given,) if isinstance(given, str) else tuple(given)


def table_report(
    data: Any, choice: Choice, how: Adjusting | None = None, fdr: float = FDR, seed: int = 0
) -> TableReport:
    """Read a table, judge it, and adjust it where that is asked for.

    Raises:
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    if not 0 < fdr < 1:
        raise UsageError(f"{option('--fdr', fdr)}: give a number between 0 and 1.")
    if seed < 0:
        raise UsageError(f"{option('--seed', seed)}: give a whole number of at least 0.")
    if how is not None:
        _require_output(how, data)
    read = _read(data, choice)
    reference = None if how is None else _place(read, how.reference)
    design = read.design
    found = fit(read.values, design)
    if not found.known.any():
        raise NothingToProbeError(
            f"{read.name}: no feature can be judged. The first, {read.features[0]}, {_why_unknown(read, found, 0)}."
        )
    tests = test_features(found, design)
    judged = judge(read.values, design, found.known, fdr, seed)
    measured = figures(found, tests, judged, design, fdr)
    usable = np.isfinite(measured.std) & (measured.std > 0) & found.known
    adjusted = None if how is None else adjust(read.values, design, reference, how.mean_only)
    if adjusted is not None and how is not None:
        content = read.written(adjusted.values, adjusted.left, how.output.suffix.lower())
        write_all({how.output: content}, how.force, "--adjust")
    kept = np.flatnonzero(usable)
    return TableReport(
        tool=Tool("bnprobe", __version__),
        data=read.name,
        batch=design.name,
        covariates=tuple(covariate.name for covariate in design.covariates),
        rows=len(read.values),
        fdr=fdr,
        agree=judged.agree,
        population=tuple(name for name, inside in zip(design.batches, judged.population, strict=True) if inside),
        explained=float(tests.explained[usable].mean()) if len(kept) else 0.0,
        batches=tuple(_batch(read, found, judged, measured, place, kept) for place in range(len(design.batches))),
        features=tuple(
            TableFeature(
                name=read.features[place],
                values=int(found.counts[:, place].sum()),
                mean=float(measured.mean[place]),
                std=float(measured.std[place]),
                location=float(tests.location[place]),
                scale=float(tests.scale[place]),
                rate=float(tests.rate[place]),
                differs=bool(tests.rate[place] <= fdr),
                explained=float(tests.explained[place]),
            )
            for place in kept
        ),
        skipped=tuple(
            SkippedFeature(read.features[place], _why_unknown(read, found, place))
            for place in np.flatnonzero(~usable).tolist()
        ),
        adjusted=None if adjusted is None or how is None else _adjustment(read, adjusted, how, fdr),
        projection=_projection(read, kept, adjusted, seed),
        notes=(*read.notes, *_notes(read, found)),
    )


def _require_output(how: Adjusting, data: Any) -> None:
    output = how.output
    able = endings(data)
    if output.suffix.lower() not in able:
        raise UsageError(f"{option('--adjust', output)}: give a file that ends in {listed(able)}.")
    require_new([output], how.force, option("--adjust"))
    if isinstance(data, str | PathLike):
        refuse_input(output, [Path(data)], option("--adjust"))


def _read(data: Any, choice: Choice) -> Table:
    read = read_table(data, choice)
    why = read.design.confounding()
    if why is not None:
        raise DataError(
            f"{read.name} is confounded: {why}. Leave that covariate out, or measure more: no calculation tells them"
            " apart."
        )
    return read


def _place(read: Table, reference: str | None) -> int | None:
    if reference is None:
        return None
    names = read.design.batches
    if reference not in names:
        near = nearest(reference, names)
        raise UsageError(
            f"{option('--reference', reference)}: {read.design.name} has no such value; "
            + (f'did you mean "{near}"?' if near else f"it has {listed(names)}.")
        )
    return names.index(reference)


def _batch(read: Table, found: Fit, judged: Judged, measured: Figures, place: int, kept: Any) -> TableBatch:
    each, values = measured.mismatch[place, kept], found.counts[place, kept]
    there = ~np.isnan(each)
    mismatch = float(np.average(each[there], weights=values[there])) if there.any() else None
    inside = bool(judged.population[place])
    rows = int((read.design.batch == place).sum())
    total = float(found.counts[:, kept][judged.population].sum(0).mean()) if len(kept) else 0.0
    size = None if mismatch is None else equivalent_batch_size(mismatch, total if inside else math.inf)
    low, high = judged.interval[place]
    return TableBatch(
        name=read.design.batches[place],
        rows=rows,
        off=bool(judged.off[place]),
        mismatch=mismatch,
        equivalent_batch_size=size,
        expected=float(judged.expected[place]),
        expected_interval=(float(low), float(high)),
        p_value=float(judged.p_value[place]),
        differing=tuple(read.features[feature] for feature in kept if measured.differs[place, feature]),
        r=_known(measured.r[place, kept]),
        d=_known(measured.d[place, kept]),
    )


def _known(values: Any) -> tuple[float | None, ...]:
    return tuple(None if value != value else value for value in values.tolist())


def _why_unknown(read: Table, found: Fit, place: int) -> str:
    number = int(found.counts[:, place].sum())
    if number == 0:
        return "has no values"
    if found.freedom[place] <= 0:
        return f"has {count(number, 'value')}, too few for the effects of batches and covariates"
    values = read.values[:, place]
    lowest, highest = np.nanmin(values), np.nanmax(values)
    if lowest == highest:
        return "is constant"
    if highest - lowest < SMALLEST:
        return f"differs by less than {SMALLEST:g}, which has no square: give it in another unit"
    if not read.design.covariates and not found.known[place]:
        return "is all but constant"
    if found.known[place]:
        return "is constant in the batches that agree, or has no values there"
    return "is constant but for the covariates, or its rows do not tell the covariates from the batches"


def _notes(read: Table, found: Fit) -> list[str]:
    sizes = np.bincount(read.design.batch)
    notes = []
    for rows, (one, several), why in (
        (1, ("has one row", "have one row each"), "there is no r, and nothing can be said of the scale"),
        (2, ("has two rows", "have two rows each"), "too few to test the scale"),
    ):
        few = [name for name, size in zip(read.design.batches, sizes, strict=True) if size == rows]
        if few:
            notes.append(f"{listed(few, 6)} {one if len(few) == 1 else several}: {why}.")
    alike = grouped((" ".join(name.casefold().split()), f'"{name}"') for name in read.design.batches)
    notes += [f"{listed(each)} differ in case or white space alone." for each in alike.values() if len(each) > 1]
    known = f"{read.design.name} and the other covariates" if len(read.design.covariates) > 1 else read.design.name
    notes += [
        f"{name} all but follows from {known}: {percent(part)} of its variance is left. The variance of its effect is"
        f" {1 / part:,.0f} times what it would be if they had nothing to do with each other; what is one's is easily"
        " taken for the other's."
        for name, part in _entangled(read)
    ]
    missing = int(np.isnan(read.values).sum())
    if missing:
        notes.append(
            f"{count(missing, 'value')} of {read.values.size:,} {'is' if missing == 1 else 'are'} missing: each feature"
            " is judged on the rows that have it."
        )
    return notes


def _entangled(read: Table) -> list[tuple[str, float]]:
    """Covariates that all but follow from the rest of the design, and the part of their variance that is left."""
    return [(name, part) for name, part in read.design.left_over() if part < _LITTLE]


def _adjustment(read: Table, adjusted: Adjusted, how: Adjusting, fdr: float) -> TableAdjustment:
    again = fit(adjusted.values, read.design)
    tests = test_features(again, read.design)
    names = read.design.batches
    return TableAdjustment(
        output=str(how.output),
        reference=how.reference,
        mean_only=tuple(name for name, alone in zip(names, adjusted.mean_only, strict=True) if alone),
        unchanged=tuple(read.features[place] for place in np.flatnonzero(adjusted.left)),
        entangled=tuple(name for name, _ in _entangled(read)),
        shrunk=adjusted.shrunk,
        explained=float(tests.explained[again.known].mean()) if again.known.any() else 0.0,
        differing=int((tests.rate <= fdr).sum()),
    )


def _projection(read: Table, kept: Any, adjusted: Adjusted | None, seed: int) -> TableProjection | None:
    if len(kept) < 2 or len(read.values) < 3:
        return None
    random = np.random.default_rng(seed)
    rows, columns = np.arange(len(read.values)), kept
    if len(rows) > _MOST_ROWS:
        rows = np.sort(random.choice(rows, _MOST_ROWS, replace=False))
    if len(columns) > _MOST_FEATURES:
        columns = np.sort(random.choice(columns, _MOST_FEATURES, replace=False))
    tables = [each[np.ix_(rows, columns)] for each in (read.values, *([adjusted.values] if adjusted else []))]
    lowest, highest = (pick(tables[0], axis=0) for pick in (np.fmin.reduce, np.fmax.reduce))
    varies = highest > lowest
    if varies.sum() < 2:
        return None
    (before, *after), explained = projected(tables[0][:, varies], [each[:, varies] for each in tables[1:]])
    return TableProjection(
        explained=explained,
        batches=tuple(read.design.batch[rows].tolist()),
        before=_points(before),
        after=_points(after[0]) if after else (),
    )


def _points(found: Any) -> tuple[tuple[float, float], ...]:
    return tuple((float(f"{x:.5g}"), float(f"{y:.5g}")) for x, y in found.tolist())

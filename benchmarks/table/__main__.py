"""``python -m benchmarks.table``: beside ComBat of other packages, and on tables whose batch effects are known."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterable
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch are imported

import numpy as np
import torch

from benchmarks.faults.score import markdown
from benchmarks.setting import machine
from benchmarks.table.libraries import LIBRARIES, Drawn, drawn
from benchmarks.timing import interleave
from bnprobe import __version__
from bnprobe.stats.adjustment import adjust
from bnprobe.stats.batch_effects import Covariate, Design, figures, fit, judge, test_features

SIZES = ((50, 20_000, 5), (500, 2_000, 8))
"""Rows, features and batches."""

SHIFTS = (0.0, 0.1, 0.2, 0.4, 0.8)
"""Standard deviation over features of the shift of a batch, in standard deviations within batches."""


def main() -> int:
    """Print the report, and write it where asked; 0 whatever the figures are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds and tables: does it run at all?")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write RESULTS.md there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    installed = {name: row for name, row in LIBRARIES.items() if find_spec(name)}
    packages = ", ".join(f"{name} {version(name)}" for name in installed) or "no other package is installed"
    report = "\n\n".join(
        [
            "# Batch effects in tables",
            f"{date.today().isoformat()}, bnprobe {__version__}, {machine(torch.device('cpu'))}, {platform.system()};"
            f" {packages}.",
            *_beside(installed, 3 if arguments.quick else 9),
            *_recovered(3 if arguments.quick else 20),
            *_found(5 if arguments.quick else 200),
        ]
    )
    report += (
        f"\n\n`python {' '.join(['-m benchmarks.table', *sys.argv[1:]])}` took {time.perf_counter() - started:.0f} s."
    )
    print(report)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "RESULTS.md").write_text(report + "\n")
    return 0


# --- Beside other packages --------------------------------------------------------------------------------------------


def _beside(installed: dict[str, tuple], rounds: int) -> list[str]:
    times, agreement = [], []
    for rows, features, batches in SIZES:
        table = drawn(rows, features, batches)
        size = f"{rows} x {features:,}, {batches} batches"
        for name, (library, correction, numbers) in installed.items():
            design = table.design(numbers)
            for reference, mean_only in ((None, False), (None, True), (1, False)):
                theirs = library(table, reference, mean_only)
                ours = adjust(table.values, design, reference, mean_only, correction).values
                setting = "mean only" if mean_only else "to a reference batch" if reference else "location and scale"
                agreement.append([name, size, setting, f"{np.abs(theirs - ours).max():.1e}"])
            found = interleave(
                {"ours": partial(adjust, table.values, design, None, False, correction), name: partial(library, table)},
                rounds,
                torch.device("cpu"),
                processor=True,
            )
            times.append(
                [
                    name,
                    size,
                    *(f"{1e3 * found.median(each):,.0f} ms" for each in (name, "ours")),
                    f"{found.ratio(name, 'ours'):.1f} x",
                ]
            )
        whole = interleave(
            {"judged": partial(_judged, table)}, max(3, rounds // 3), torch.device("cpu"), processor=True
        )
        times.append(["all that `bnprobe table` says", size, "", f"{1e3 * whole.median('judged'):,.0f} ms", ""])
    return [
        "## Beside ComBat of other packages",
        "Largest absolute difference of the adjusted values, whose standard deviation is about 1 within batches; with a"
        " categorical covariate, and beside neuroCombat a number, too.",
        markdown([["package", "table", "adjusted", "difference"], *agreement]),
        f"Processor time, median of {rounds} rounds in which both run in turn. Their time is that of the call, which"
        " has the table as they take it, without reading files.",
        markdown([["package", "table", "time of the package", "bnprobe", "ratio"], *times]),
    ]


def _judged(table: Drawn) -> None:
    design = table.design()
    found = fit(table.values, design)
    tests = test_features(found, design)
    figures(found, tests, judge(table.values, design, found.known), design)


# --- Known effects ----------------------------------------------------------------------------------------------------


def _recovered(tables: int) -> list[str]:
    rows = []
    for number, (size, batches) in enumerate((((20, 1_000), 4), ((60, 1_000), 4), ((240, 1_000), 4))):
        errors = np.array([_errors(drawn(*size, batches, seed)) for seed in range(100 * number, 100 * number + tables)])
        rows.append([f"{size[0]} rows in {batches} batches", *(f"{each:.3f}" for each in errors.mean(0))])
    head = [
        "1,000 features",
        "location, adjusted",
        "location, raw",
        "scale, adjusted",
        "scale, raw",
        "age, adjusted",
        "age, no shifts",
    ]
    return [
        "## Known effects recovered",
        f"Root mean square errors over {tables} tables, in standard deviations within batches: of the location that is"
        " taken out (raw: the mean of the batch, without shrinkage), of the logarithm of the scale, and of the slope of"
        " the covariate age over its range of 60, by least squares in the adjusted table and in one without shifts.",
        markdown([head, *rows]),
    ]


def _errors(table: Drawn) -> list[float]:
    design = table.design()
    found, adjusted = fit(table.values, design), adjust(table.values, design)
    counts = found.counts
    std = np.sqrt(found.squares.sum(0) / len(table.values))
    centred = table.location - (counts * table.location).sum(0) / counts.sum(0)
    raw = found.centre - (counts * found.centre).sum(0) / counts.sum(0)
    relative = np.log(table.scale / std)
    clean = table.values - table.location[table.batch]
    return [
        _root(adjusted.location * std - centred),
        _root(raw - centred),
        _root(np.log(adjusted.scale) - relative),
        _root(0.5 * np.log(found.squares / (counts - 1)) - np.log(std) - relative),
        60 * _root(_slope(adjusted.values, table) - table.slope),
        60 * _root(_slope(clean, table) - table.slope),
    ]


def _slope(values: np.ndarray, table: Drawn) -> np.ndarray:
    beside = np.column_stack([np.ones(len(values)), table.sex, table.age])
    return np.linalg.lstsq(beside, values, rcond=None)[0][2]


def _root(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


# --- Which batches are off --------------------------------------------------------------------------------------------


def _found(tables: int) -> list[str]:
    rows = []
    for kind in (
        "independent, normal",
        "correlated, t with 4 degrees of freedom",
        "a covariate that follows the batch",
        "a covariate that follows the batch, a fifth of the values missing",
    ):
        for shift in SHIFTS:
            outcomes = np.array([_outcome(kind, shift, seed) for seed in range(tables)])
            off, healthy, features = outcomes.mean(0)
            rows.append([kind, f"{shift:g}", _share(off) if shift else "", _share(healthy), _share(features)])
    return [
        "## Which batches are off",
        f"{tables} tables in each row: 96 rows in 6 batches and 200 features. Two batches are shifted, each feature by"
        " a normal amount of this standard deviation. At the default rate of 5%: how often a shifted batch is called"
        " off, in how many tables one of the others is, and how many features are said to differ (without a shift: in"
        " how many tables any is).",
        markdown(
            [
                [
                    "values",
                    "shift",
                    "shifted batches called off",
                    "tables with another one called off",
                    "features that differ",
                ],
                *rows,
            ]
        ),
    ]


def _share(value: float) -> str:
    return f"{value:.1%}"


def _outcome(kind: str, shift: float, seed: int) -> Iterable[float]:
    random = np.random.default_rng(seed)
    batch = np.arange(96) % 6
    values = random.standard_t(4, (96, 200)) / 2**0.5 if "t with" in kind else random.normal(size=(96, 200))
    if "correlated" in kind:
        values = values + random.normal(size=(96, 3)) @ random.normal(size=(3, 200))
        values = values / 2
    covariates: tuple[Covariate, ...] = ()
    if "covariate" in kind:
        age = random.normal(size=96) + 0.5 * batch
        values = values + np.outer(age, random.normal(size=200))
        covariates = (Covariate("age", age),)
    moved = np.zeros((6, 200))
    moved[[1, 4]] = random.normal(0, 1, (2, 200)) * shift
    values = values + moved[batch]
    if "missing" in kind:
        values[random.random(values.shape) < 0.2] = np.nan
    design = Design("plate", tuple("ABCDEF"), batch, covariates)
    found = fit(values, design)
    tests = test_features(found, design)
    judged = judge(values, design, found.known)
    differs = tests.rate <= 0.05
    others = judged.off[[0, 2, 3, 5]].any() if shift else judged.off.any()
    return [judged.off[[1, 4]].mean(), float(others), float(differs.mean() if shift else differs.any())]


if __name__ == "__main__":
    sys.exit(main())

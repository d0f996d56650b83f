"""``bnprobe table``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnprobe.cli import options
from bnprobe.errors import EXIT_CLEAN, EXIT_FINDINGS, UsageError

COLUMNS, ADJUST = "Columns", "Adjusted table"


def table(
    data: Annotated[
        Path,
        typer.Argument(help="A table with a row for each sample: .csv, .tsv, .parquet or .h5ad.", metavar="DATA"),
    ],
    batch: Annotated[str, options.option(COLUMNS, "--batch", "The column that says the batch of a row.", "COLUMN")],
    covariates: Annotated[
        list[str] | None,
        options.option(
            COLUMNS, "--covariates", "Columns whose effects are no batch effects, e.g. dose,age; repeatable.", "COLUMNS"
        ),
    ] = None,
    categorical: Annotated[
        list[str] | None,
        options.option(
            COLUMNS, "--categorical", "Covariates that are categories, though they are numbers; repeatable.", "COLUMNS"
        ),
    ] = None,
    features: Annotated[
        list[str] | None,
        options.option(
            COLUMNS,
            "--features",
            "Measurements, also as patterns (default: columns of numbers); repeatable.",
            "COLUMNS",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        options.option(
            COLUMNS, "--ignore", "Columns that are no measurements, also as patterns; repeatable.", "COLUMNS"
        ),
    ] = None,
    fdr: Annotated[
        float,
        options.option(
            options.JUDGE,
            "--fdr",
            "False discovery rate of features, and probability that a batch is called off where all are alike.",
            "Q",
        ),
    ] = 0.05,
    seed: Annotated[
        int, options.option(options.JUDGE, "--seed", "Seed of the tables that are dealt at random.", "N")
    ] = 0,
    adjust: Annotated[
        Path | None,
        options.option(ADJUST, "--adjust", "Write the table without batch effects (as ComBat) to FILE.", "FILE"),
    ] = None,
    reference: Annotated[
        str | None, options.option(ADJUST, "--reference", "Adjust the other batches to this one.", "BATCH")
    ] = None,
    mean_only: Annotated[
        bool, options.option(ADJUST, "--mean-only", "Adjust the location alone, not the scale.")
    ] = False,
    format_: options.ReportFormat = None,
    output: options.Output = None,
    output_dir: options.OutputDir = None,
    force: Annotated[
        bool, options.option(options.REPORT, "--force", "Replace files that exist, of the report and of --adjust.")
    ] = False,
    show_all: Annotated[bool, options.option(options.REPORT, "--all", "Show every batch and feature.")] = False,
    exit_zero: options.ExitZero = False,
) -> None:
    """Batch effects in a table of measurements: which batches are off, which features differ, and a table without them.

    It compares how each batch and the population would normalize each feature, as a scan does with layers.

    Exit codes: 0 no batch is off and no feature differs; 1 some do; 2 error in usage or in the table, or the design is
    confounded; 3 no feature can be judged.
    """
    from bnprobe.cli.delivery import Delivery
    from bnprobe.cli.processes import importing
    from bnprobe.paths import placed, real
    from bnprobe.records import TableReport

    delivery = Delivery("table", TableReport, format_, output=output, folder=output_dir, force=force, show_all=show_all)
    delivery.check([data])
    if adjust is not None and output is not None and real(adjust) == real(output):
        raise UsageError(f"--adjust {adjust} is the file of the report, too; give another name.")
    with importing():
        from bnprobe.commands.table import Adjusting, table_report
        from bnprobe.loading.table import Choice
    chosen = (options.codes(given or []) for given in (covariates, categorical, features, ignore))
    how = Adjusting.of(None if adjust is None else placed(adjust), reference, mean_only, force)
    found = table_report(data, Choice(batch, *chosen), how, fdr, seed)
    delivery.deliver(found)
    if found.adjusted is not None:
        from bnprobe.cli.streams import say
        from bnprobe.numbers import joined

        alike = found.adjusted.entangled
        doubt = f"; {joined([*alike, batch])} are hardly told apart: see the report" if alike else ""
        say(f"Adjusted table written to {adjust}{doubt}.")
    raise typer.Exit(EXIT_CLEAN if found.ok or exit_zero else EXIT_FINDINGS)

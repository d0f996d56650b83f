"""``bnprobe compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnprobe.cli import options


def compare(
    reports: Annotated[
        list[Path],
        typer.Argument(help="JSON reports of scans of one model, in order.", metavar="REPORT..."),
    ],
    format_: options.ReportFormat = None,
    output: options.Output = None,
    output_dir: options.OutputDir = None,
    force: options.ForceReport = False,
    show_all: options.ShowAll = False,
) -> None:
    """Compare the reports of two scans or more layer by layer: which differences are sure, and the course over time.

    Neither model nor data is needed. Whether a repair holds, bnprobe verify says.

    Exit codes: 0 compared, 2 a file is no report, or the reports are of different models.
    """
    from bnprobe.cli.delivery import Delivery
    from bnprobe.commands.compare import compare_named
    from bnprobe.records import Comparison, Report
    from bnprobe.report.json import read_as

    delivery = Delivery(
        "compare", Comparison, format_, output=output, folder=output_dir, force=force, show_all=show_all
    )
    delivery.check(reports)
    delivery.deliver(compare_named([(str(path), read_as(path, Report)) for path in reports]))

"""``bnprobe verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnprobe.cli import options
from bnprobe.errors import EXIT_CLEAN, EXIT_FINDINGS


def verify(
    before: Annotated[Path, typer.Argument(help="JSON report of a scan of the original model.", metavar="BEFORE")],
    after: Annotated[Path, typer.Argument(help="JSON report of a scan of the repaired model.", metavar="AFTER")],
    format_: options.ReportFormat = None,
    output: options.Output = None,
    output_dir: options.OutputDir = None,
    force: options.ForceReport = False,
    show_all: options.ShowAll = False,
) -> None:
    """Compare the reports of two scans of one model to verify a repair. Neither model nor data is needed.

    Exit codes: 0 no layer is flagged any more and the outputs are not farther apart; 1 the repair does not hold, or is
    not proved, because a flagged layer was not measured again; 2 a file is not a report, or the reports are of
    different models.
    """
    from bnprobe.cli.delivery import Delivery
    from bnprobe.commands.verify import compare
    from bnprobe.records import Report, Verification
    from bnprobe.report.json import read_as

    delivery = Delivery(
        "verify", Verification, format_, output=output, folder=output_dir, force=force, show_all=show_all
    )
    delivery.check([before, after])
    found = compare(read_as(before, Report), read_as(after, Report))
    delivery.deliver(found)
    raise typer.Exit(EXIT_CLEAN if found.passed else EXIT_FINDINGS)

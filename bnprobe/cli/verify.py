"""``bnprobe verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnprobe.cli import options
from bnprobe.errors import EXIT_CLEAN, EXIT_FINDINGS, UsageError, reason_of

if TYPE_CHECKING:
    from bnprobe.records import Report


def verify(
    before: Annotated[Path, typer.Argument(help="JSON report of a scan of the original model.", metavar="BEFORE")],
    after: Annotated[Path, typer.Argument(help="JSON report of a scan of the repaired model.", metavar="AFTER")],
    format_: options.ReportFormat = options.TERMINAL,
    output: options.Output = None,
    show_all: options.ShowAll = False,
) -> None:
    """Compare the reports of two scans of one model to verify a repair. Neither model nor data is needed.

    Exit codes: 0 no layer is flagged any more and the outputs are not farther apart; 1 the repair does not hold; 2 a
    file is not a report, or the reports are of different models.
    """
    from bnprobe.cli.console import check_writable, deliver
    from bnprobe.commands.verify import verify as compare
    from bnprobe.records import Verification
    from bnprobe.report import renderer
    from bnprobe.report.verify import one_line

    render = renderer(format_, Verification)
    check_writable(output)
    found = compare(_read(before), _read(after))
    deliver(found, render, output, show_all, one_line(found))
    raise typer.Exit(EXIT_CLEAN if found.passed else EXIT_FINDINGS)


def _read(path: Path) -> Report:
    """Read a saved JSON report.

    Raises:
        UsageError: The file cannot be read or is not a report; the message names it.
    """
    from bnprobe.config.spec import why_missing
    from bnprobe.report.json import load_report

    if (missing := why_missing(path)) is not None:
        raise UsageError(f"The report {path} {missing}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a JSON report of bnprobe: it is not text.") from None
    except OSError as error:
        raise UsageError(f"The report {path} could not be read: {reason_of(error)}.") from None
    try:
        return load_report(text)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None

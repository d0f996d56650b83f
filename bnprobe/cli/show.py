"""``bnprobe show``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnprobe.cli import options

if TYPE_CHECKING:
    from bnprobe.records import Record, RepairRecord
    from bnprobe.report.repair import RepairReport


def show(
    document: Annotated[
        Path,
        typer.Argument(
            help="A JSON file that a command of bnprobe wrote, or the log of a bnprobe.Monitor.", metavar="REPORT"
        ),
    ],
    format_: options.ReportFormat = None,
    output: options.Output = None,
    output_dir: options.OutputDir = None,
    force: options.ForceReport = False,
    show_all: options.ShowAll = False,
) -> None:
    """Show a saved report again, in any format: of a scan, sweep, lint, verify, export or plan, a repair's record, or a
    log of training.

    Neither model nor data is needed. Beside a record, out.record.json, the reports of its scans are read too. A log is
    the folder or .jsonl file that a bnprobe.Monitor was given.

    Exit codes: 0 shown, 2 the file is no report, is incomplete, or was written by a newer version.
    """
    from bnprobe.cli.delivery import Delivery
    from bnprobe.errors import UsageError
    from bnprobe.monitor.log import is_log, read_log
    from bnprobe.records import MonitorLog, RepairRecord
    from bnprobe.report.json import read_document

    read: Record = read_log(document) if is_log(document) else read_document(document)
    shown = _with_scans(read, document) if isinstance(read, RepairRecord) else read
    file = Path(read.path) if isinstance(read, MonitorLog) and is_log(document) else document
    delivery = Delivery(
        document.stem.strip(".") or "log",
        type(shown),
        format_,
        output=output,
        folder=output_dir,
        force=force,
        show_all=show_all,
        typed=_command(read),
    )
    delivery.check([file])
    try:
        delivery.deliver(shown)
    except (ArithmeticError, LookupError, StopIteration, ValueError) as error:  # bnprobe writes no such report
        said = str(error) or type(error).__name__
        raise UsageError(f"{document} fits its schema, but its figures contradict each other: {said}.") from error


def _with_scans(record: RepairRecord, path: Path) -> RepairReport:
    """The record with what the repair wrote beside it, where the file still has its name."""
    from bnprobe.cli.artifacts import Artifacts
    from bnprobe.paths import is_file
    from bnprobe.records import Report
    from bnprobe.report.json import read_as
    from bnprobe.report.repair import Files, RepairReport

    beside = Artifacts(path.with_name(f"{path.name.removesuffix('.record.json')}.safetensors"))
    if beside.record != path:
        return RepairReport(record, files=Files(record=str(path)))
    before, after, log = (each if is_file(each) else None for each in (beside.before, beside.after, beside.log))
    return RepairReport(
        record,
        None if before is None else read_as(before, Report),
        None if after is None else read_as(after, Report),
        Files(str(path), *(None if each is None else str(each) for each in (before, after, log))),
    )


def _command(document: Record) -> str:
    """The command that made a document; of a scan from Python, one that would do so."""
    from bnprobe.records import RepairRecord, Report, SweepReport

    if isinstance(document, RepairRecord):
        return document.command or f"bnprobe {document.action} {shlex.quote(document.model)}"
    if not isinstance(document, Report | SweepReport):
        return ""
    scan = document.scan
    words = ["bnprobe", "scan" if isinstance(document, Report) else "sweep", scan.model]
    words += ["--checkpoint", scan.checkpoint] if scan.checkpoint else []
    return scan.command or shlex.join([*words, "--batch-size", str(scan.batch_size)])

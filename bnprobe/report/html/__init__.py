"""Reports as one page of HTML that loads nothing: for a browser, an e-mail, the artifacts of CI.

What makes pages (Jinja2, Altair, the script of Vega) is imported only where a page is written.
"""

from __future__ import annotations

from bnprobe.records import LabReport, MonitorLog, Report, SweepReport, TableReport, Verification
from bnprobe.report.page import RenderOptions
from bnprobe.report.repair import RepairReport


def render_scan(report: Report, options: RenderOptions) -> str:
    """The report of a scan."""
    from bnprobe.report.html.page import write
    from bnprobe.report.html.scan import scan_page

    return write(lambda: scan_page(report, options))


def render_sweep(report: SweepReport, options: RenderOptions) -> str:
    """The report of a sweep."""
    from bnprobe.report.html.page import write
    from bnprobe.report.html.sweep import sweep_page

    return write(lambda: sweep_page(report, options))


def render_repair(report: RepairReport, options: RenderOptions) -> str:
    """The record of a repair; what its scans and files say is left out where there are none."""
    from bnprobe.report.html.page import write
    from bnprobe.report.html.repair import repair_page

    return write(lambda: repair_page(report, options))


def render_verification(found: Verification, options: RenderOptions) -> str:
    """The report of a verification."""
    from bnprobe.report.html.page import write
    from bnprobe.report.html.verify import verify_page

    return write(lambda: verify_page(found, options))


def render_log(log: MonitorLog, options: RenderOptions) -> str:
    """The log of a monitor."""
    from bnprobe.report.html.log import log_page
    from bnprobe.report.html.page import write

    return write(lambda: log_page(log))


def render_table(found: TableReport, options: RenderOptions) -> str:
    """The report of a table."""
    from bnprobe.report.html.batch_effects import table_page
    from bnprobe.report.html.page import write

    return write(lambda: table_page(found, options))


def render_lab(found: LabReport, options: RenderOptions) -> str:
    """The results of an experiment."""
    from bnprobe.report.html.lab import lab_page
    from bnprobe.report.html.page import write

    return write(lambda: lab_page(found))


def picture_of_lab(found: LabReport) -> str:
    """The first chart of an experiment as an SVG."""
    from bnprobe.report.html.lab import picture

    return picture(found)

"""The report of ``bnprobe export``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.text import Text

from bnprobe.numbers import count, finite_or_none
from bnprobe.records import Difference, ExportReport
from bnprobe.report.json import to_text
from bnprobe.report.page import FINE, FLAGGED, UNMEASURED, Page, RenderOptions, to_string


def render(report: ExportReport, options: RenderOptions) -> str:
    """The export as text in lines of at most ``options.width`` cells."""
    page = Page.of(options)
    parts = [
        _header(report, page),
        _differences("Outputs of the file against those of the model", report.differences, page),
        _differences("Outputs of the quantized model against those of the model as loaded", report.quantization, page),
        page.paragraphs(report.notes, first=""),
        _closing(report, page),
    ]
    return to_string(parts, options.color)


def render_json(report: ExportReport, options: RenderOptions) -> str:
    """The export as JSON; an infinite difference is null."""
    return to_text(finite_or_none(asdict(report)), ascii_only=not options.unicode)


def _header(report: ExportReport, page: Page) -> list[Text]:
    quantized = ", quantized to 8 bits" if report.quantization else ""
    checkpoint = f", weights of {report.checkpoint}" if report.checkpoint else ""
    return page.heading(f"{report.model}{checkpoint}: {report.format}{quantized}")


def _differences(heading: str, found: Sequence[Difference], page: Page) -> list[Text]:
    if not found:
        return []
    sizes = ", ".join(str(images) for images in dict.fromkeys(each.images for each in found))
    rows = [
        ("largest absolute difference", f"{max(each.absolute for each in found):.3g}"),
        ("largest relative difference", f"{max(each.relative for each in found):.3g} (of the largest output)"),
        ("checked on", f"{count(len(found), 'batch')} of {sizes} samples"),
    ]
    return [*page.heading(heading), *page.labelled(rows)]


def _closing(report: ExportReport, page: Page) -> list[Text]:
    if report.output is None:
        largest = max((each.relative for each in report.differences), default=0.0)
        return page.verdict(
            FLAGGED,
            f"The outputs differ by {largest:.3g}, above the tolerance of {report.tolerance:g}: nothing was written."
            " --tolerance accepts more.",
        )
    if report.differences:
        return page.verdict(FINE, f"The outputs agree within {report.tolerance:g}: written to {report.output}.")
    return page.verdict(UNMEASURED, f"Written to {report.output}; its outputs were not checked.")

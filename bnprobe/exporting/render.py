"""The output of ``bnprobe export``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from bnprobe.exporting.compare import Difference
from bnprobe.exporting.export import Exported
from bnprobe.reports import figures, glyphs
from bnprobe.reports.interface import RenderOptions
from bnprobe.reports.layout import MINIMUM_WIDTH, Page, to_string
from bnprobe.reports.standing import STYLES


def render(exported: Exported, tolerance: float, written: str | None, options: RenderOptions) -> str:
    """Render an export as text, in lines of at most ``options.width`` cells.

    Args:
        exported: The exported file and its check.
        tolerance: Largest accepted relative difference of the outputs.
        written: Path of the file; None: nothing was written, because the outputs differ.
        options: Width, colour and character set.
    """
    page = Page(max(options.width, MINIMUM_WIDTH), options.unicode)
    parts = [
        _header(exported, page),
        _differences("Outputs of the file compared with the model", exported.differences, page),
        _differences("Outputs of the quantized model compared with the model as loaded", exported.quantization, page),
        [line for note in exported.notes for line in page.paragraph(note)],
        _closing(exported, tolerance, written, page),
    ]
    lines: list[Text] = []
    for part in parts:
        lines += [Text(), *part] if lines and part else part
    return to_string(lines, options.color)


def _header(exported: Exported, page: Page) -> list[Text]:
    quantized = ", quantized to 8 bits" if exported.quantization else ""
    checkpoint = f", weights of {exported.checkpoint}" if exported.checkpoint else ""
    return page.paragraph(f"{exported.model}{checkpoint}: {exported.format}{quantized}", style="bold")


def _differences(heading: str, found: Sequence[Difference], page: Page) -> list[Text]:
    if not found:
        return []
    worst = max(found, key=lambda each: each.relative)
    sizes = ", ".join(str(images) for images in dict.fromkeys(each.images for each in found))
    rows = [
        ("largest absolute difference", f"{max(each.absolute for each in found):.3g}"),
        ("largest relative difference", f"{worst.relative:.3g} (of the largest output)"),
        ("checked on", f"{figures.count(len(found), 'batch')} of {sizes} samples"),
    ]
    return [*page.heading(heading), *page.labelled(rows)]


def _closing(exported: Exported, tolerance: float, written: str | None, page: Page) -> list[Text]:
    if written is None:
        sign = glyphs.FLAGGED
        text = (
            f"The outputs differ by {exported.relative:.3g}, more than the tolerance of {tolerance:g}: nothing was"
            " written. --tolerance sets another one."
        )
    elif exported.differences:
        sign, text = glyphs.FINE, f"The outputs agree within {tolerance:g}: written to {written}."
    else:
        sign, text = glyphs.UNMEASURED, f"Written to {written}; the outputs were not checked."
    lines = page.paragraph(text, style="bold", first=f"{page.clean(sign)} ")
    lines[0].stylize(STYLES[sign], 0, 1)
    return lines

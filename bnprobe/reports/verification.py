"""What ``bnprobe verify`` prints: two reports of one model, compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from rich.text import Text

from bnprobe.records import SCHEMA_VERSION, Verification
from bnprobe.reports import figures, glyphs
from bnprobe.reports.beforeafter import comparison
from bnprobe.reports.documents import to_text
from bnprobe.reports.interface import RenderOptions
from bnprobe.reports.layout import MINIMUM_WIDTH, Page, to_string
from bnprobe.reports.plan import listed
from bnprobe.reports.standing import STYLES


def render_terminal(found: Verification, options: RenderOptions) -> str:
    """The comparison as text in lines of at most ``options.width`` cells."""
    page = Page(max(options.width, MINIMUM_WIDTH), options.unicode)
    table = comparison(found.layers, page, options.show_all)
    parts = [
        [*page.heading(f"{_flagged(found)} (D of the worse path)"), *table] if table else [],
        _sentences("Only in one of the reports", _alone(found, options.show_all), page),
        _sentences("Output, train path against eval path (relative L2)", _output(found), page),
        _sentences("What weakens the comparison", found.notes, page),
        _closing(found, page),
    ]
    lines: list[Text] = []
    for part in parts:
        lines += [Text(), *part] if lines and part else part
    return to_string(lines, options.color)


def render_json(found: Verification, options: RenderOptions | None = None) -> str:
    """The comparison as JSON: the record as it is, after the version of its schema."""
    return to_text({"schema_version": SCHEMA_VERSION, **asdict(found)})


FORMATS: Mapping[str, Callable[[Verification, RenderOptions], str]] = {
    "terminal": render_terminal,
    "json": render_json,
}


def one_line(found: Verification) -> str:
    """The result in one line, e.g. "passed: 6 of 9 layers flagged before, none after"."""
    return f"{'passed' if found.passed else 'failed'}: {_flagged(found)}"


def _flagged(found: Verification) -> str:
    before = sum(layer.flagged_before for layer in found.layers)
    after = sum(layer.flagged_after for layer in found.layers)
    layers = figures.count(len(found.layers), "layer")
    return f"{before or 'none'} of {layers} flagged before, {after or 'none'} after"


def _alone(found: Verification, show_all: bool) -> list[str]:
    sides = (("before", found.only_before), ("after", found.only_after))
    return [f"only {when}: {listed(names, show_all)}" for when, names in sides if names]


def _output(found: Verification) -> list[str]:
    if found.output_before is None and found.output_after is None:
        return []
    before, after = (
        glyphs.UNMEASURED if value is None else figures.relative(value)
        for value in (found.output_before, found.output_after)
    )
    return [f"{before} {glyphs.ARROW} {after}"]


def _sentences(heading: str, texts: Sequence[str], page: Page) -> list[Text]:
    lines = [line for text in texts for line in page.paragraph(text, first="  ")]
    return [*page.heading(heading), *lines] if lines else []


def _closing(found: Verification, page: Page) -> list[Text]:
    sign = glyphs.FINE if found.passed else glyphs.FLAGGED
    compared = found.output_before is not None and found.output_after is not None
    outputs = ", and the outputs disagree no more than before" if compared else ""
    text = f"The repair holds: no layer is flagged{outputs}." if found.passed else "The repair does not hold."
    lines = page.paragraph(text, style="bold", first=f"{page.clean(sign)} ")
    lines[0].stylize(STYLES[sign], 0, 1)
    return lines + [line for problem in found.problems for line in page.paragraph(problem, first="  ")]

"""``bnprobe explain``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.text import Text

    from bnprobe.report.page import Page
    from bnprobe.rules import Rule

_LEAST_NEEDS = 9
"""Narrower than this, the last column of the list is a line of its own."""


def explain(
    code: Annotated[
        str | None,
        typer.Argument(help="A rule's code (BN201) or cause (small_batch). Default: a list of all rules."),
    ] = None,
) -> None:
    """Print the manual of a rule: what it checks, why it matters, an example, the remedy, references."""
    from bnprobe.cli.console import print_report
    from bnprobe.report import RenderOptions
    from bnprobe.report.page import Page, to_string
    from bnprobe.rules.selection import find_rule

    rule = None if code is None else find_rule(code)

    def render(rule: Rule | None, options: RenderOptions) -> str:
        page = Page.of(options)
        return to_string([list(_table(page) if rule is None else _manual(rule, page))], options.color)

    print_report(rule, render)


def _table(page: Page) -> Iterator[Text]:
    from rich.text import Text

    from bnprobe.rules import RULES
    from bnprobe.rules.docs import needs_in_words

    rows = [("Code", "Finds", "Cause", "Needs")]
    rows += [(rule.code, rule.title, rule.cause, needs_in_words(rule)) for rule in RULES]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        first = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) + "  "
        beside = page.width - len(first) >= _LEAST_NEEDS
        lines = page.paragraph(row[3], first=first) if beside else page.paragraphs([first.rstrip(), row[3]], first="")
        for line in lines:
            yield Text(line.plain, "bold") if row is rows[0] else line
    yield from page.paragraph("bnprobe explain CODE prints the manual of a rule.")


def _manual(rule: Rule, page: Page) -> Iterator[Text]:
    from rich.text import Text

    from bnprobe.rules.docs import manual, needs_in_words

    text = manual(rule)
    yield from page.heading(f"{rule.code}: {rule.title}")
    yield from page.paragraph(text.summary)
    needs = needs_in_words(rule)
    yield from page.paragraph(f"Cause {rule.cause}; severity {rule.severity}; needs {needs}.", style="dim")
    for heading, paragraph in text.sections:
        yield Text()
        yield from page.heading(heading)
        yield from page.paragraph(paragraph, first="  ")

"""The findings of a report against its baseline, in words, for every format that is read by people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.text import Text

from bnprobe.numbers import listed, number
from bnprobe.records import BASELINE_STATES, BaselineChange, BaselineComparison, BaselineState
from bnprobe.report.findings import MODEL
from bnprobe.report.page import ARROW, Page

MEANINGS: dict[BaselineState, str] = {
    "new": "not in the baseline",
    "worse": "more severe, or surely farther beyond the limit, than in the baseline",
    "known": "equal or better than in the baseline, within their interval",
    "fixed": "in the baseline, and no findings any more",
    "stale": "in the baseline, and not judged again: write a new baseline",
}

_MOST_LISTED = 8


def heading(found: BaselineComparison) -> str:
    """The counts, e.g. "Against the baseline b.json: 1 new, 0 worse, 3 known, 1 fixed, 0 stale"."""
    counts = ", ".join(f"{len(found.of(state))} {state}" for state in BASELINE_STATES)
    return f"Against the baseline {found.file}: {counts}"


def sentences(found: BaselineComparison, show_all: bool) -> Iterator[str]:
    """What is of each state, and what the exit code counts."""
    for state in BASELINE_STATES:
        names = [_named(change) for change in found.of(state)]
        if names:
            yield f"{state} ({MEANINGS[state]}): {listed(names, len(names) if show_all else _MOST_LISTED)}"


def known(found: BaselineComparison | None, page: Page, show_all: bool) -> list[Text]:
    """The comparison as a part of the report for the terminal; nothing without a baseline."""
    return [] if found is None else page.section(heading(found), sentences(found, show_all), rest="    ")


def lines(found: BaselineComparison, show_all: bool) -> list[str]:
    """The comparison line by line."""
    return [heading(found), *(f"    {text}" for text in sentences(found, show_all))]


def _named(change: BaselineChange) -> str:
    values = [number(value) for value in (change.before, change.after) if value is not None]
    measured = f" ({f' {ARROW} '.join(values)})" if values else ""
    return f"{change.rule} {change.layer or MODEL}{measured}"

"""Results of a benchmark as a Markdown table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        what: What was measured.
        figure: The figure as text: a ratio, and the absolute figures behind it.
        goal: The goal as text; "" if there is none.
        met: Whether the goal is met; None if there is no goal or nothing was measured.
    """

    what: str
    figure: str
    goal: str = ""
    met: bool | None = None


def at_most(what: str, ratio: float, goal: float | None, detail: str) -> Row:
    """A relative cost, which should be small; None: without a goal."""
    figure = f"{ratio:.2f} x ({detail})"
    return Row(what, figure) if goal is None else Row(what, figure, f"at most {goal:g} x", ratio <= goal)


def at_least(what: str, ratio: float, goal: float, detail: str) -> Row:
    """A speed-up, which should be large."""
    return Row(what, f"{ratio:.2f} x ({detail})", f"at least {goal:g} x", ratio >= goal)


def render(rows: list[Row]) -> str:
    """A Markdown table."""
    marks = {True: "met", False: "MISSED", None: ""}
    cells = [("what", "figure", "goal", ""), *((row.what, row.figure, row.goal, marks[row.met]) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])

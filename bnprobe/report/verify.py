"""The report of ``bnprobe verify``, and the table of layers before and after that a repair's report shows too."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.text import Text

from bnprobe.numbers import count
from bnprobe.records import Layer, LayerComparison, Report, Verification
from bnprobe.report import figures
from bnprobe.report.figures import listed_in_line
from bnprobe.report.layers import worse_path
from bnprobe.report.page import ARROW, FINE, FLAGGED, UNDECIDED, UNMEASURED, Page, RenderOptions, to_string
from bnprobe.report.table import Column, Mark, arrows, dropping, layer_names, table

MOST_LAYERS = 12
"""So many layers are shown, those that were or are worst, unless all are asked for."""


NO_SCORES = (
    "This compares how training and inference normalize. It knows neither loss nor metric: what a repair gained in"
    " these, its own report and record say."
)


def render(found: Verification, options: RenderOptions) -> str:
    """The comparison as text in lines of at most ``options.width`` cells."""
    page = Page.of(options)
    rows = _table(compared(found), page, options.show_all) if found.layers else []
    parts = [
        [*page.heading(f"{_flagged(found)} (D, the larger of training and inference)"), *rows] if rows else [],
        page.section(ALONE, in_one_report(found, options.show_all)),
        page.section(OUTPUT, output_in_words(found)),
        page.section("Notes on the comparison", found.notes),
        page.verdict(*closing(found)),
    ]
    return to_string(parts, options.color)


def title(found: Verification) -> str:
    """What the report is of, and what wrote it."""
    return f"{found.tool.name} {found.tool.version}: verify of {found.model}"


ALONE = "Only in one of the reports"


def in_one_report(found: Verification, show_all: bool) -> list[str]:
    """The layers that one of the reports lacks, a clause for each report."""
    sides = (("before", found.only_before), ("after", found.only_after))
    return [f"only {when}: {listed_in_line(names, show_all)}" for when, names in sides if names]


def one_line(found: Verification) -> str:
    """The result in one line, e.g. "passed: 6 of 9 layers flagged before, none after"."""
    result = "no change" if found.unchanged else "passed" if found.passed else "failed"
    return f"{result}: {_flagged(found)}"


def before_and_after(
    before: Report, after: Report | None, replaced: Mapping[str, str], page: Page, show_all: bool
) -> list[Text]:
    """The layers of two reports, by name, with n_eq and D of the worse mode; nothing if there are none to compare.

    Args:
        before: The scan before the repair.
        after: The one after it; None: nothing was left to scan.
        replaced: What layers that the later scan does not measure have become, by name.
        page: What the lines are written on.
        show_all: Show every layer.
    """
    rows = compared_scans(before, after, replaced)
    return [*page.heading(BEFORE_AND_AFTER), *_table(rows, page, show_all)] if rows else []


BEFORE_AND_AFTER = "Mismatch before and after, the larger of training and inference"


def compared_scans(before: Report, after: Report | None, replaced: Mapping[str, str]) -> list[ComparedLayer]:
    """The layers that two scans have in common, and those that were replaced; see `before_and_after`."""
    later = {} if after is None else {layer.name: layer for layer in after.layers}
    return [
        _row(layer, later[layer.name]) if layer.name in later else _replaced(layer, replaced[layer.name])
        for layer in before.layers
        if layer.name in later or layer.name in replaced
    ]


def compared(found: Verification) -> list[ComparedLayer]:
    """The layers of a verification."""
    return [ComparedLayer(layer) for layer in found.layers]


def _flagged(found: Verification) -> str:
    before = sum(layer.flagged_before for layer in found.layers)
    after = sum(layer.flagged_after for layer in found.layers)
    unknown = {"undecided": _undecided(found), "not measured": sum(layer.lost for layer in found.layers)}
    also = "".join(f" and {number} {what}" for what, number in unknown.items() if number)
    return f"{before or 'none'} of {count(len(found.layers), 'layer')} flagged before, {after or 'none'} after{also}"


def _undecided(found: Verification) -> int:
    return sum(layer.undecided_after for layer in found.layers)


OUTPUT = "Output: training against inference (relative L2)"


def output_in_words(found: Verification) -> list[str]:
    if found.output_before is None and found.output_after is None:
        return []
    before, after = (figures.known(value, figures.relative) for value in (found.output_before, found.output_after))
    return [f"{before} {ARROW} {after}"]


def closing(found: Verification) -> tuple[str, str, tuple[str, ...]]:
    """The sign of the verdict, the verdict, and what qualifies it."""
    compared = found.output_before is not None and found.output_after is not None
    outputs = ", and the outputs in training and at inference are no farther apart than before" if compared else ""
    if not found.passed:
        # A single problem of a layer that is lost is that one.
        unproved = len(found.problems) == 1 and any(layer.lost for layer in found.layers)
        sign, headline = (
            (UNDECIDED, "The repair is not proved.") if unproved else (FLAGGED, "The repair does not hold.")
        )
        return sign, headline, (*found.problems, NO_SCORES)
    if found.unchanged:
        return FINE, "No change: both reports have the same figures.", ()
    unsure = _undecided(found)
    also = f" ({unsure} undecided)" if unsure else ""
    text = f"The repair holds: no layer is flagged{also}{outputs}."
    lost = any(layer.flagged_before and layer.undecided_after for layer in found.layers)
    return UNDECIDED if lost else FINE, text, ()


# --- The table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ComparedLayer:
    """A layer before and after.

    Attributes:
        layer: The mismatch D, and how it stands.
        equivalent: n_eq, as printed; empty where the reports are not at hand.
        became: The class that it has become, where that cannot be scanned.
    """

    layer: LayerComparison
    equivalent: tuple[str, str] = ("", "")
    became: str = ""

    @property
    def badness(self) -> tuple[bool, bool, bool, float]:
        """Flagged after, undecided after, flagged before, the larger mismatch."""
        layer = self.layer
        values = [value for value in (layer.before, layer.after) if value is not None]
        return layer.flagged_after, layer.undecided_after, layer.flagged_before, max(values, default=-math.inf)


def _row(before: Layer, after: Layer) -> ComparedLayer:
    paths = [worse_path(layer.train, layer.eval) for layer in (before, after)]
    mismatches = [None if path is None else path.mismatch for path in paths]
    first, last = (figures.path_equivalent(path) for path in paths)
    layer = LayerComparison(before.name, mismatches[0], mismatches[1], before.flagged, after.flagged, after.undecided)
    return ComparedLayer(layer, (first, last))


def _replaced(before: Layer, became: str) -> ComparedLayer:
    """A layer that has become something without running statistics to compare with."""
    path = worse_path(before.train, before.eval)
    layer = LayerComparison(before.name, None if path is None else path.mismatch, None, before.flagged, False)
    return ComparedLayer(layer, (figures.path_equivalent(path), UNMEASURED), became)


def _table(rows: Sequence[ComparedLayer], page: Page, show_all: bool) -> list[Text]:
    worst = sorted(rows, key=lambda row: row.badness, reverse=True)[:MOST_LAYERS]
    kept = {row.layer.name for row in worst}
    shown = rows if show_all else [row for row in rows if row.layer.name in kept]
    equivalents = [row.equivalent for row in shown]
    mismatches = [mismatches_of(row.layer) for row in shown]
    flags = [what_became(row) for row in shown]
    columns = [
        *([Column("n_eq", arrows(equivalents, page))] if any(map(any, equivalents)) else []),
        Column("D", arrows(mismatches, page)),
        *([Column("", flags, "left")] if any(flags) else []),
    ]
    marks = [Mark.of(sign_after(row.layer)) for row in shown]
    names = layer_names([row.layer.name for row in shown], [row.layer.name for row in rows], page, marks)
    # With n_eq beside it, D can be dropped.
    lines = table(names, dropping(columns, ("D", "") if any(map(any, equivalents)) else ("",)), page)
    return [*lines, *_hidden(rows, shown, page)]


def mismatches_of(layer: LayerComparison) -> tuple[str, str]:
    """D before and after, as printed."""
    return figures.known(layer.before, figures.mismatch), figures.known(layer.after, figures.mismatch)


def sign_after(layer: LayerComparison) -> str:
    """How a layer stands now."""
    if layer.flagged_after:
        return FLAGGED
    if layer.after is None:
        return UNMEASURED
    return UNDECIDED if layer.undecided_after else FINE


def what_became(row: ComparedLayer) -> str:
    """What has become of a layer; empty where it was fine and is so."""
    layer = row.layer
    if row.became:
        return f"now {row.became}"
    if layer.after is None and not layer.flagged_after:
        return "not measured"
    if layer.undecided_after:
        return "undecided now" if layer.flagged_before else "undecided"
    return {
        (True, True): "still flagged",
        (True, False): "no longer flagged",
        (False, True): "newly flagged",
        (False, False): "",
    }[layer.flagged_before, layer.flagged_after]


def _hidden(rows: Sequence[ComparedLayer], shown: Sequence[ComparedLayer], page: Page) -> list[Text]:
    """What the table leaves out, by what has become of the flags."""
    if len(shown) == len(rows):
        return []
    left_out = [row for row in rows if row not in shown]
    numbers = Counter(what_became(row) or "not flagged" for row in left_out)
    parts = ", ".join(f"{number} {words}" for words, number in numbers.items())
    text = f"{count(len(left_out), 'more layer')} ({parts}); {page.every} shows all."
    return page.paragraph(text, "dim", first="   ")

"""The report of a plan: what ``bnprobe convert --dry-run`` and ``--check`` print."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rich.cells import cell_len
from rich.text import Text

from bnprobe.config.targets import AUTO
from bnprobe.numbers import count
from bnprobe.records import LayerChange, Plan
from bnprobe.report.figures import listed_in_line
from bnprobe.report.page import ARROW, Page, RenderOptions, to_string
from bnprobe.report.table import Column, Names, TableLayout, table

MOST_LAYERS = 25
"""A plan with more layers shows the first, unless all are asked for."""

_LEAST_NAME, _LEAST_REASON = 20, 28
_ONLY_PLANNED = ("--dry-run", "--check")
_OUTPUT = ("--output", "-o")


def render(plan: Plan, options: RenderOptions) -> str:
    """The plan as text in lines of at most ``options.width`` cells; changing nothing is said as well."""
    page, show_all = Page.of(options), options.show_all
    parts = [
        _headline(plan, page),
        _changes(plan, page, show_all),
        _notes(plan.changes, page, show_all),
        refused(plan, page, show_all),
        _closing(plan, page, options.command),
    ]
    return to_string(parts, options.color)


def refused(plan: Plan, page: Page, show_all: bool) -> list[Text]:
    """Layers that were asked for and cannot be converted, by reason."""
    groups = plan.refused_by_reason()
    left = "left as it is" if len(plan.refused) == 1 else "left as they are"
    lines = page.heading(f"Refused: {count(len(plan.refused), 'layer')}, {left}") if groups else []
    for (kind, reason), names in groups.items():
        what = names[0] if len(names) == 1 else listed_in_line(names, show_all)
        lines += page.paragraph(f"{what} ({kind}): {reason}", first="  ", rest="    ")
    return lines


def kinds(changes: Sequence[LayerChange]) -> list[tuple[str, int]]:
    """Every "kind -> new kind", and of how many layers, in their order."""
    return list(Counter(f"{change.kind} {ARROW} {change.to}" for change in changes).items())


def _headline(plan: Plan, page: Page) -> list[Text]:
    number = len(plan.changes)
    total = number + len(plan.refused) + plan.untouched
    if plan.refused and not number:
        return page.heading(f"No layer can be converted to {plan.to}; the layers were chosen by {plan.source}.")
    if not number:
        return page.heading(f"Nothing to convert: {plan.source} selects no layer.")
    to = "the target with the best score (--to auto)" if plan.to == AUTO else plan.to
    return page.heading(
        f"{number} of {count(total, 'normalization layer')} would become {to}, chosen by {plan.source}."
    )


def _changes(plan: Plan, page: Page, show_all: bool) -> list[Text]:
    """One line for each layer; what is the same for all of them is said once, above."""
    changes = plan.changes
    if not changes:
        return []
    shown = changes if show_all else changes[:MOST_LAYERS]
    found, reasons = kinds(changes), {change.reason for change in changes}
    # Both class names, the former shortened as in the table of layers.
    classes = [
        f"{change.kind.replace('BatchNorm', 'BN')} {ARROW} {change.to}" if len(found) > 1 and plan.to != AUTO else ""
        for change in shown
    ]
    lines = [] if len(found) > 1 or plan.to == AUTO else page.paragraph(f"Class: {found[0][0]}", first="  ")
    lines += [] if len(reasons) > 1 else page.paragraph(f"Why: {changes[0].reason}", first="  ")
    lines += _rows(shown, classes, [change.reason if len(reasons) > 1 else "" for change in shown], page)
    if len(shown) < len(changes):
        left_out = count(len(changes) - len(shown), "more layer")
        lines += page.paragraph(f"and {left_out}; {page.every} shows all.", first="  ")
    return lines


def _rows(shown: Sequence[LayerChange], classes: Sequence[str], reasons: Sequence[str], page: Page) -> list[Text]:
    """Name, class and reason; reasons stand below where the page is too narrow for them beside."""
    columns = [Column("", page.shorten(classes, page.width // 2), "left")] if any(classes) else []
    names = Names([change.name for change in shown], heading="")
    said = max(cell_len(page.clean(reason)) for reason in reasons)
    room = page.width - names.indent - sum(2 + column.width(page) for column in columns)
    longest = names.longest(page)
    if said and room - said - 2 >= _LEAST_NAME:  # rather a shorter name than a reason of two lines
        longest = min(longest, room - said - 2)
    beside = not said or room - longest - 2 >= min(_LEAST_REASON, said)
    lines: list[Text] = []
    for row, reason in zip(table(replace(names, most=longest), [TableLayout(columns)], page), reasons, strict=True):
        if not reason:
            lines.append(row)
        elif beside:
            lines += page.paragraph(reason, "dim", first=f"{row.plain}  ")
        else:
            lines += [row, *page.paragraph(reason, "dim", first="      ")]
    return lines


def _notes(changes: Sequence[LayerChange], page: Page, show_all: bool) -> list[Text]:
    """What changes beyond the class, and the other names of shared layers."""
    groups: dict[str, list[str]] = {}
    for change in changes:
        if change.note:
            groups.setdefault(change.note, []).append(change.name)
        if change.aliases:
            groups.setdefault(f"the same layer as {listed_in_line(change.aliases, show_all)}", []).append(change.name)
    lines = page.heading("Notes on layers") if groups else []
    for note, names in groups.items():
        lines += page.paragraph(f"{listed_in_line(names, show_all)}: {note}", first="  ", rest="    ")
    return lines


def _closing(plan: Plan, page: Page, command: str) -> list[Text]:
    sentences = [*_untouched(plan), *([deployment(plan)] if plan.changes else []), "Nothing has been changed."]
    lines = [line for text in sentences for line in page.paragraph(text)]
    if not plan.changes:
        return lines
    why = "To convert, fine-tune and measure what that gains:"
    return [*lines, *page.paragraph(why), *page.command(_for_real(command))] if command else lines


def _untouched(plan: Plan) -> list[str]:
    if not plan.untouched:
        return []
    other = "other " if plan.changes or plan.refused else ""
    stays = "stays as it is" if plan.untouched == 1 else "stay as they are"
    return [f"{count(plan.untouched, f'{other}normalization layer')} {stays}."]


def deployment(plan: Plan) -> str:
    """Whether the repaired weights load into the model as it is, a sentence."""
    if plan.deploys:
        return "The repaired weights load strictly into your own model, as plain BatchNorm."
    return (
        f"The repaired weights do not load into a model with plain BatchNorm: convert the model to"
        f" {plan.to} first, then load them."
    )


def _for_real(command: str) -> str:
    """The command that makes the plan come true."""
    words = [word for word in shlex.split(command) if word not in _ONLY_PLANNED]
    words += [] if "--finetune" in words else ["--finetune"]
    named = any(word in _OUTPUT or word.startswith("--output=") for word in words)
    return shlex.join(words if named else [*words, "--output", "repaired.safetensors"])

"""What a repair would change, and why: ``bnprobe convert --dry-run`` and ``--check``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate

from rich.cells import cell_len
from rich.text import Text

from bnprobe.records import SCHEMA_VERSION, LayerChange, Plan
from bnprobe.reports import figures, glyphs
from bnprobe.reports.command import broken
from bnprobe.reports.documents import to_text
from bnprobe.reports.interface import RenderOptions
from bnprobe.reports.layout import MINIMUM_WIDTH, Page, pad, to_string

MOST_LAYERS = 25
"""A plan with more layers shows the first, unless all are asked for."""

_MOST_LISTED = 120
_LEAST_NAME, _LEAST_REASON = 20, 28
_ONLY_PLANNED = ("--dry-run", "--check")
_OUTPUT = ("--output", "-o")
_AUTO = "auto"
_INDENT = "  "


def render_plan(plan: Plan, options: RenderOptions) -> str:
    """The plan as text in lines of at most ``options.width`` cells; changing nothing is said as well."""
    page = Page(max(options.width, MINIMUM_WIDTH), options.unicode)
    parts = [
        _headline(plan, page),
        _changes(plan, page, options.show_all),
        _notes(plan.changes, page, options.show_all),
        refused(plan, page, options.show_all),
        _closing(plan, page, options.command),
    ]
    lines: list[Text] = []
    for part in parts:
        lines += [Text(), *part] if lines and part else part
    return to_string(lines, options.color)


def plan_json(plan: Plan) -> str:
    """The plan as JSON: the record as it is, after the version of its schema."""
    return to_text({"schema_version": SCHEMA_VERSION, **asdict(plan)})


def refused(plan: Plan, page: Page, show_all: bool) -> list[Text]:
    """Layers that were asked for and cannot be converted, by reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for layer in plan.refused:
        groups.setdefault((layer.kind, layer.reason), []).append(layer.name)
    left = "left as it is" if len(plan.refused) == 1 else "left as they are"
    lines = page.heading(f"Refused: {figures.count(len(plan.refused), 'layer')}, {left}") if groups else []
    for (kind, reason), names in groups.items():
        what = names[0] if len(names) == 1 else listed(names, show_all)
        lines += page.paragraph(f"{what} ({kind}): {reason}", first="  ", rest="    ")
    return lines


def kinds(changes: Sequence[LayerChange]) -> list[tuple[str, int]]:
    """Every "kind -> new kind", and of how many layers, in their order."""
    numbers: dict[str, int] = {}
    for change in changes:
        words = f"{change.kind} {glyphs.ARROW} {change.to}"
        numbers[words] = numbers.get(words, 0) + 1
    return list(numbers.items())


def listed(names: Sequence[str], show_all: bool) -> str:
    """Names, the first few of many, e.g. "bn1, bn2 and 7 more"; at least two, and about a line and a half of them."""
    ends = accumulate(len(name) + 2 for name in names)
    fitting = max(2, sum(end <= _MOST_LISTED for end in ends))
    shown = names if show_all or len(names) <= fitting + 1 else names[:fitting]
    more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return ", ".join(shown) + more


def _headline(plan: Plan, page: Page) -> list[Text]:
    number = len(plan.changes)
    total = number + len(plan.refused) + plan.untouched
    if plan.refused and not number:
        return page.heading(f"No layer can be converted to {plan.to}; they were chosen by {plan.source}.")
    if not number:
        return page.heading(f"Nothing to convert: {plan.source} chose no layer.")
    to = "whatever does best (--to auto)" if plan.to == _AUTO else plan.to
    return page.heading(
        f"{number} of {figures.count(total, 'normalization layer')} would become {to}; chosen by {plan.source}."
    )


def _changes(plan: Plan, page: Page, show_all: bool) -> list[Text]:
    """One line for each layer; what is the same for all of them is said once, above."""
    changes = plan.changes
    if not changes:
        return []
    shown = changes if show_all else changes[:MOST_LAYERS]
    found, reasons = kinds(changes), {change.reason for change in changes}
    classes = [_class(change) if len(found) > 1 and plan.to != _AUTO else "" for change in shown]
    lines = [] if len(found) > 1 or plan.to == _AUTO else page.paragraph(f"Class: {found[0][0]}", first="  ")
    lines += [] if len(reasons) > 1 else page.paragraph(f"Why: {changes[0].reason}", first="  ")
    lines += _rows(shown, classes, [change.reason if len(reasons) > 1 else "" for change in shown], page)
    if len(shown) < len(changes):
        left_out = figures.count(len(changes) - len(shown), "more layer")
        lines += page.paragraph(f"and {left_out}; --all shows every one.", first=_INDENT)
    return lines


def _rows(shown: Sequence[LayerChange], classes: Sequence[str], reasons: Sequence[str], page: Page) -> list[Text]:
    """Name, class and reason; reasons stand below where the page is too narrow for them beside."""
    classes = page.shorten(classes, page.width // 2)
    width = max(map(cell_len, classes))
    gap = "  " if width else ""
    longest = max(cell_len(page.clean(change.name)) for change in shown)
    said = max(cell_len(page.clean(reason)) for reason in reasons)
    room = page.width - len(_INDENT) - len(gap) - width
    if said and room - said - 2 >= _LEAST_NAME:  # rather a shorter name than a reason of two lines
        longest = min(longest, room - said - 2)
    beside = not said or room - longest - 2 >= min(_LEAST_REASON, said)
    names = page.shorten([change.name for change in shown], min(longest, room))
    across = max(map(cell_len, names))
    lines: list[Text] = []
    for name, kind, reason in zip(names, classes, reasons, strict=True):
        start = f"{_INDENT}{pad(name, across)}{gap}{pad(kind, width)}"
        row = page.paragraph(reason, "dim", first=f"{start}  ") if beside and reason else [Text(start.rstrip())]
        below = [] if beside or not reason else page.paragraph(reason, "dim", first="      ")
        lines += [*row, *below]
    return lines


def _class(change: LayerChange) -> str:
    """Both class names, the former shortened as in the table of layers."""
    return f"{change.kind.replace('BatchNorm', 'BN')} {glyphs.ARROW} {change.to}"


def _notes(changes: Sequence[LayerChange], page: Page, show_all: bool) -> list[Text]:
    """What changes beyond the class, and the other names of shared layers."""
    groups: dict[str, list[str]] = {}
    for change in changes:
        if change.note:
            groups.setdefault(change.note, []).append(change.name)
        if change.aliases:
            groups.setdefault(f"the same layer as {listed(change.aliases, show_all)}", []).append(change.name)
    lines = page.heading("Notes on layers") if groups else []
    for note, names in groups.items():
        lines += page.paragraph(f"{listed(names, show_all)}: {note}", first="  ", rest="    ")
    return lines


def _closing(plan: Plan, page: Page, command: str) -> list[Text]:
    sentences = [*_untouched(plan), *([deployment(plan)] if plan.changes else []), "Nothing has been changed."]
    lines = [line for text in sentences for line in page.paragraph(text)]
    if not plan.changes:
        return lines
    why = "To convert, fine-tune and measure what that gains:"
    return [*lines, *page.paragraph(why), *command_lines(_for_real(command), page)]


def _untouched(plan: Plan) -> list[str]:
    if not plan.untouched:
        return []
    other = "other " if plan.changes or plan.refused else ""
    stays = "stays as it is" if plan.untouched == 1 else "stay as they are"
    return [f"{figures.count(plan.untouched, f'{other}normalization layer')} {stays}."]


def deployment(plan: Plan) -> str:
    """Whether the repaired weights load into the model as it is, a sentence."""
    if plan.deploys:
        return "The repaired weights load strictly into your own model, as plain BatchNorm."
    return (
        f"The repaired weights will not deploy as plain BatchNorm: whoever loads them needs the model converted to"
        f" {plan.to} first."
    )


def command_lines(command: str, page: Page) -> list[Text]:
    """A command to copy, indented, in as many lines as it takes."""
    parts = [page.clean(part) for part in broken(command, page.width - 6)]
    indents = ["    "] + ["      "] * (len(parts) - 1)
    return [Text(indent + part, "bold") for indent, part in zip(indents, parts, strict=True)]


def _for_real(command: str) -> str:
    """The command that makes the plan come true."""
    words = [word for word in shlex.split(command) if word not in _ONLY_PLANNED]
    words += [] if "--finetune" in words else ["--finetune"]
    named = any(word in _OUTPUT or word.startswith("--output=") for word in words)
    return shlex.join(words if named else [*words, "--output", "repaired.safetensors"])

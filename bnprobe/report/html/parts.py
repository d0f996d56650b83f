"""Parts that several pages have: the next command, skipped layers, the machine, the command that made the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bnprobe.numbers import count
from bnprobe.records import Environment, SkippedLayer
from bnprobe.report import scan as words
from bnprobe.report.html.page import Block, Card, Command, Fold, Points, Text
from bnprobe.report.next_step import NextStep
from bnprobe.report.page import UNMEASURED, RenderOptions


def next_step(step: NextStep | None) -> list[Block]:
    """What to do next, where there is anything: a page is saved already."""
    step = None if step is None else step.when_saved
    if step is None:
        return []
    return [Text((step.why,))] if step.command is None else [Command(step.why, (step.command,))]


def points(items: Iterable[str | tuple[str, str]]) -> tuple[Block, ...]:
    """Sentences as a list, each alone or after its sign; nothing where there are none."""
    listed = tuple(("", each) if isinstance(each, str) else each for each in items)
    return (Points(listed),) if listed else ()


def skipped_cards(skipped: Iterable[SkippedLayer]) -> Iterator[Block]:
    """The layers that could not be judged, those of one reason together."""
    for (kind, reason), names in words.skipped_by_reason(skipped).items():
        yield Card(UNMEASURED, names[0] if len(names) == 1 else count(len(names), "layer"), kind, (("", reason),))
        if len(names) > 1:
            yield Fold("Their names", points(names))


def environment(found: Environment) -> list[tuple[str, str]]:
    """The machine and its software."""
    return [
        ("python", found.python),
        ("platform", f"{found.platform}, {count(found.threads, 'thread')}"),
    ]


def reproduce(command: str | None) -> list[Block]:
    """The command that the report comes from."""
    if not command or command == RenderOptions.command:
        return []
    return [Command("The command that gave this report:", (command,))]

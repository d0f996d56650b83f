"""The manuals of the rules, from their docstrings: for ``bnprobe explain`` and as pages of the documentation.

``python -m bnprobe.rules.docs FOLDER`` writes the pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from bnprobe.docstrings import docstring
from bnprobe.rules import RULES, Rule
from bnprobe.rules.interface import SECTIONS

_HEADING = re.compile(rf"^({'|'.join(SECTIONS)}):\n((?:(?:    .*)?\n)*)", re.MULTILINE)


@dataclass(frozen=True)
class Manual:
    """A rule's docstring by its parts.

    Attributes:
        summary: The first line.
        sections: Heading and text of each section, the text as one paragraph.
    """

    summary: str
    sections: tuple[tuple[str, str], ...]


def manual(rule: Rule) -> Manual:
    """The manual of a rule."""
    summary, _, rest = (docstring(type(rule)) + "\n").partition("\n\n")
    sections = tuple((found[1], " ".join(found[2].split())) for found in _HEADING.finditer(rest))
    return Manual(" ".join(summary.split()), sections)


def page(rule: Rule) -> str:
    """The manual as a page of Markdown."""
    text = manual(rule)
    facts = f"Cause: `{rule.cause}`. Severity: {rule.severity}. Needs: {needs_in_words(rule)}."
    parts = [f"# {rule.code}: {rule.title}", text.summary, facts]
    for heading, paragraph in text.sections:
        parts += [f"## {heading}", paragraph]
    return "\n\n".join(parts) + "\n"


def index(rules: Iterable[Rule]) -> str:
    """The list of rules as a page of Markdown."""
    rows = [
        f"| [{rule.code}]({rule.code}.md) | {rule.title} | `{rule.cause}` | {rule.severity} | {needs_in_words(rule)} |"
        for rule in rules
    ]
    head = [
        "# Rules",
        "",
        "`bnprobe explain CODE` prints the same pages. Rules that need the model alone also run in `bnprobe lint`.",
        "",
        "| Code | Finds | Cause | Severity | Needs |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows]) + "\n"


def pages() -> dict[str, str]:
    """Every page by its file name; ``README.md`` is the list of all rules."""
    return {"README.md": index(RULES)} | {f"{rule.code}.md": page(rule) for rule in RULES}


def needs_in_words(rule: Rule) -> str:
    """What must be available for the rule to judge."""
    need = "the model alone" if rule.needs == "model" else rule.needs
    return f"real {need}" if rule.real_data else need


if __name__ == "__main__":
    import sys
    from pathlib import Path

    for name, text in pages().items():
        (Path(sys.argv[1]) / name).write_text(text, encoding="utf-8")

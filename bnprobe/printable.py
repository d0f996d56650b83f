"""Text that is not bnprobe's own, made safe to show: names, keys, values, paths, and what exceptions say.

A terminal obeys some characters and hides or reorders others. Whatever bnprobe shows goes through this module: messages
through `message`, reports through `escaped` where their lines are drawn, JSON through `escaped_json`, and formats of
other packages through `escaped_lines`.
"""

from __future__ import annotations

import re

PROSE_WIDTH = 100
"""Columns at which sentences are wrapped at the latest: longer lines are hard to read."""

LONGEST_WORD = 1000
"""Characters of a word that are shown; the middle of a longer one is left out. Paths are shorter."""

LONGEST_PARAGRAPH = 50_000
"""The same for a paragraph of a report, which may list a thousand layers."""

LONGEST_LINE = 4000
"""The same for a line of a message."""

MOST_LINES = 200
"""The same for lines of a message."""

_COMMAND = re.compile(r"^\s*::|##\[|##vso\[")
"""What makes a command of a line in the log of a CI job: on GitHub and Azure DevOps."""

_WORD = re.compile(rf"\S{{{LONGEST_WORD + 1},}}")


def escaped(text: str, kept: str = "") -> str:
    """The text with escapes as Python writes them in place of all characters that cannot be seen as they are.

    These are control characters, which could act on a terminal, characters that change the direction of writing or are
    invisible, and bytes of a file name that are no text. The result can be encoded as UTF-8.

    Args:
        text: Any text.
        kept: Characters that stay as they are, e.g. line breaks.
    """
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in kept
        else char.encode("unicode_escape", "backslashreplace").decode("ascii")
        for char in text
    )


def escaped_lines(text: str) -> str:
    """A document of lines, which may end as on Windows, with such escapes; tabs stay."""
    lines = (line if line.isprintable() else _escaped_line(line) for line in text.split("\n"))
    return "\n".join(lines)


def _escaped_line(line: str) -> str:
    body = line.removesuffix("\r")
    return escaped(body, kept="\t") + line[len(body) :]


def escaped_json(text: str, ascii_only: bool = False) -> str:
    """A JSON document in which strings hold escapes of JSON in place of such characters: it means the same.

    Bytes of a file name that are no text, which no JSON can hold, become the text that `escaped` gives.

    Args:
        text: A JSON document.
        ascii_only: Escape all characters that are not ASCII.
    """
    if text.isascii() and "\x7f" not in text:
        return text
    return "".join(
        char if char == "\n" or (char.isprintable() and (char.isascii() or not ascii_only)) else _json_escape(char)
        for char in text
    )


def _json_escape(char: str) -> str:
    if "\ud800" <= char <= "\udfff":
        return f"\\\\u{ord(char):04x}"
    units = char.encode("utf-16-be")
    return "".join(f"\\u{units[place]:02x}{units[place + 1]:02x}" for place in range(0, len(units), 2))


def cut(text: str, most: int) -> str:
    """The text in about ``most`` characters: what is left out of the middle is counted."""
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail]}[... {len(text) - most:,} characters ...]{text[len(text) - tail :]}"


def short_words(text: str) -> str:
    """The text with the middle of very long words left out."""
    return _WORD.sub(lambda word: cut(word[0], LONGEST_WORD), text) if len(text) > LONGEST_WORD else text


def message(text: str) -> str:
    """A message of one or more lines for a terminal or a log; values that are too long to read are cut.

    A name with a line break begins a line of its own, which no CI server may take for a command.
    """
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        tail = MOST_LINES // 4
        left_out = len(lines) - MOST_LINES
        lines = [*lines[: MOST_LINES - tail], f"[... {left_out:,} lines ...]", *lines[len(lines) - tail :]]
    return "\n".join(_COMMAND.sub(_disarmed, escaped(cut(line, LONGEST_LINE), kept="\t")) for line in lines)


def _disarmed(found: re.Match[str]) -> str:
    return found[0].replace("::", r":\x3a").replace("##", r"#\x23")

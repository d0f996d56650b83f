"""The characters of the terminal report, and their ASCII stand-ins."""

from __future__ import annotations

FLAGGED = "✗"
UNDECIDED = "?"
FINE = "✓"
UNMEASURED = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
ELLIPSIS = "…"
INFINITE = "∞"
CENTRE = "│"
LEVELS = " ▁▂▃▄▅▆▇█"
WARNING = "!"
INFO = "i"
BAR = "━"
CROSSED = "┿"
CUT = "»"
DEGREE = "°"
ARROW = "→"

_ASCII = str.maketrans(
    {
        FLAGGED: "x",
        FINE: ".",
        UNMEASURED: "-",
        ELLIPSIS: "...",
        INFINITE: "inf",
        CENTRE: "|",
        TIMES: "x",
        BAR: "=",
        CROSSED: "|",
        CUT: ">",
        ARROW: "->",
        DEGREE: " degrees",
        "±": "+-",
        "≤": "<=",
        "≥": ">=",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        **dict(zip(LEVELS, " .:-=+*#@", strict=True)),
    }
)


def clean(text: str, unicode: bool) -> str:
    """Text that a terminal shows as it is: one line, nothing unprintable, ASCII where need be.

    Line breaks become spaces; other characters that cannot be shown are written as Python escapes, so that a
    name holding a terminal control sequence cannot act on the terminal.
    """
    line = " ".join(text.splitlines())
    if not unicode:
        line = line.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")
    return "".join(char if char.isprintable() else _escape(char) for char in line)


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "backslashreplace").decode("ascii")

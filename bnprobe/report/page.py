"""The page that a report is written on: its options, the signs, and lines of text that fit the width.

Widths are counted in terminal cells, not characters. Lines are `rich.text.Text`, never markup, so that a name
such as "[red]" stays what it is.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from bnprobe.printable import LONGEST_PARAGRAPH, PROSE_WIDTH, cut, escaped, short_words
from bnprobe.records import Severity
from bnprobe.wording import argument_of

MINIMUM_WIDTH = 40
"""A narrower terminal is treated as one of this width."""

MAXIMUM_WIDTH = 1000
"""A wider terminal is treated as one of this width."""

# --- Signs ------------------------------------------------------------------------------------------------------------

FLAGGED = "✗"
UNDECIDED = "?"
FINE = "✓"
UNMEASURED = "\N{EN DASH}"
WARNING = "!"
INFO = "i"
TIMES = "\N{MULTIPLICATION SIGN}"
ELLIPSIS = "…"
INFINITE = "∞"
CENTRE = "│"
LEVELS = " ▁▂▃▄▅▆▇█"
BAR = "━"
THIN = "─"
CROSSED = "┿"
CUT = "»"
DEGREE = "°"
ARROW = "→"

SEVERITY_SIGNS: dict[Severity, str] = {"error": FLAGGED, "warning": WARNING, "info": INFO}
STYLES = {
    FLAGGED: "bold red",
    UNDECIDED: "yellow",
    FINE: "green",
    UNMEASURED: "dim",
    WARNING: "yellow",
    INFO: "cyan",
}
"""How a sign at the start of a line is coloured."""

SEVERITY_STYLES = {severity: STYLES[sign] for severity, sign in SEVERITY_SIGNS.items()}


def standing(flagged: bool, undecided: bool) -> str:
    """The sign of what is flagged, undecided or neither."""
    return FLAGGED if flagged else UNDECIDED if undecided else FINE


def worst_sign(severities: Iterable[Severity]) -> str:
    """The sign of the worst of some findings; of none that all is well."""
    found = set(severities)
    return next((sign for severity, sign in SEVERITY_SIGNS.items() if severity in found), FINE)


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
        THIN: "-",
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


def can_show_signs(encoding: str | None) -> bool:
    """Whether an encoding has the signs of a report; None: it is not known."""
    try:
        "✗▁█│×".encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def clean(text: str, unicode: bool) -> str:
    """Text that a terminal shows as it is: one line, nothing unprintable, ASCII where need be.

    Line breaks become spaces; see ``bnprobe.printable`` for what else is changed.
    """
    line = escaped(" ".join(cut(short_words(text), LONGEST_PARAGRAPH).splitlines()))
    return line if unicode else line.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")


# --- The page ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RenderOptions:
    """How a report is to be written; a format takes what it needs and ignores the rest.

    Attributes:
        width: Columns of the terminal; ``MINIMUM_WIDTH`` to ``MAXIMUM_WIDTH`` are used.
        color: Whether ANSI colours may be used.
        verbose: The whole report, not what fits a screen.
        show_all: The whole report, with every layer, however many there are.
        unicode: Whether the output can carry more than ASCII.
        folder: Where the command ran, as seen from the root of the repository, with forward slashes; empty: there.
        command: The command that the user ran, as typed; suggestions are written as variants of it. Empty: not known.
        python: The reader has the document at hand in Python: suggestions are calls.
    """

    width: int = 80
    color: bool = False
    verbose: bool = False
    show_all: bool = False
    unicode: bool = True
    folder: str = ""
    command: str = "bnprobe scan model.py"
    python: bool = False


@dataclass(frozen=True)
class Page:
    """What the lines are written on.

    Attributes:
        width: Terminal cells in a line.
        unicode: Whether more than ASCII may be used.
        python: Whether commands are written as calls.
    """

    width: int
    unicode: bool
    python: bool = False

    @classmethod
    def of(cls, options: RenderOptions) -> Page:
        """The page that the options ask for."""
        return cls(min(max(options.width, MINIMUM_WIDTH), MAXIMUM_WIDTH), options.unicode, options.python)

    @property
    def whole(self) -> str:
        """How the reader gets the whole report where this is a part of it."""
        return "print(report.text(verbose=True))" if self.python else "--verbose"

    @property
    def every(self) -> str:
        """How the reader gets all of what is listed in part."""
        return self.whole if self.python else "--all"

    def clean(self, text: str) -> str:
        """Text that this page can show; see `clean`."""
        return clean(text, self.unicode)

    def paragraph(self, text: str, style: str = "", first: str = "", rest: str | None = None) -> list[Text]:
        """Text wrapped at words; ``first`` precedes the first line, ``rest`` (or blanks) the others."""
        rest = " " * cell_len(first) if rest is None else rest
        room = min(self.width, PROSE_WIDTH) - max(cell_len(first), cell_len(rest))
        lines = Text(self.clean(text)).wrap(_MEASURE, room, overflow="fold")
        marks = [first] + [rest] * (len(lines) - 1)
        plain = [line.plain.rstrip() for line in lines]
        return [Text(mark) + Text(line, style) for mark, line in zip(marks, plain, strict=True)]

    def paragraphs(
        self, texts: Iterable[str], style: str = "", first: str = "  ", rest: str | None = None
    ) -> list[Text]:
        """One paragraph for each text that is not empty."""
        return [line for text in texts if text for line in self.paragraph(text, style, first, rest)]

    def heading(self, text: str) -> list[Text]:
        """The title of a part of the report."""
        return self.paragraph(text, style="bold")

    def section(self, title: str, texts: Iterable[str], rest: str | None = None) -> list[Text]:
        """A heading and indented paragraphs; nothing if there are none."""
        lines = self.paragraphs(texts, rest=rest)
        return [*self.heading(title), *lines] if lines else []

    def verdict(self, sign: str, headline: str, sentences: Iterable[str] = ()) -> list[Text]:
        """A sign and a headline in bold, and indented sentences."""
        lines = self.paragraph(headline, style="bold", first=f"{self.clean(sign)} ")
        lines[0].stylize(STYLES[sign], 0, 1)
        return lines + self.paragraphs(sentences)

    def labelled(self, rows: Sequence[tuple[str, str]], style: str = "") -> list[Text]:
        """Lines of a label and a value, the values aligned and wrapped; the labels are dim."""
        labels = [self.clean(label) for label, _ in rows]
        width = max(map(cell_len, labels), default=0) + 2
        lines: list[Text] = []
        for label, (_, value) in zip(labels, rows, strict=True):
            block = self.paragraph(value, first=pad(label, width))
            block[0].stylize("dim", 0, len(label))
            lines += block
        for line in lines:
            line.stylize(style)
        return lines

    def command(self, command: str) -> list[Text]:
        """A command to copy, indented, in as many lines as it takes."""
        if self.python and (call := as_call(command)) is not None:
            return [Text(f"    {self.clean(call)}", "bold")]
        parts = [self.clean(part) for part in broken(command, self.width - 6)]
        indents = ["    "] + ["      "] * (len(parts) - 1)
        return [Text(indent + part, "bold") for indent, part in zip(indents, parts, strict=True)]

    def shorten(self, names: Sequence[str], width: int) -> list[str]:
        """The names, cleaned, each in at most ``width`` cells; different names stay different.

        Of dotted names whole parts are left out, as few as possible. Where that does not keep them apart, the middle is
        left out, at the point nearest to it that does; where none does, names that collide are numbered.
        """
        cleaned = [self.clean(name) for name in names]
        mark = self.clean(ELLIPSIS)
        room = max(width - cell_len(mark), 0)
        tails = sorted(range(room + 1), key=lambda tail: (abs(2 * tail - room), -tail))
        for elide in (_elide_parts, _elide):
            tried = ([elide(name, width, mark, tail) for name in cleaned] for tail in tails)
            whole = ([name for name in short if name is not None] for short in tried)
            apart = [short for short in whole if len(short) == len(names) and len(set(short)) == len(set(names))]
            if apart:
                return max(apart, key=lambda short: sum(map(_cells, short)))
        return _number([_elide(name, width, mark, tails[0]) for name in cleaned], names, width)


def pad(text: str, width: int, right: bool = False) -> str:
    """Text filled with blanks to ``width`` cells; ``right``: set flush right."""
    blanks = " " * (width - cell_len(text))
    return blanks + text if right else text + blanks


def to_string(parts: Iterable[Sequence[Text]], color: bool) -> str:
    """The parts that have lines as one string, an empty line between them, with ANSI colours if wanted.

    The only control characters in it are line breaks and those of the colours.
    """
    out = StringIO()
    # NO_COLOR, COLUMNS and TERM are the command line's to read: a format depends on its options only.
    console = Console(
        file=out,
        color_system="standard" if color else None,
        force_terminal=color,
        legacy_windows=False,
        highlight=False,
        width=1_000_000,
        _environ={},
    )
    for number, part in enumerate(filter(None, parts)):
        for line in [Text(), *part] if number else part:
            line.rstrip()
            shown = line if line.plain.isprintable() else Text(escaped(line.plain), line.style)
            console.print(shown, soft_wrap=True)
    return out.getvalue()


_MEASURE = Console(file=StringIO(), color_system=None, legacy_windows=False, _environ={})


def _cells(text: str) -> int:
    """As ``cell_len``, and fast for the many names of a large network."""
    return len(text) if text.isascii() else cell_len(text)


def _elide(name: str, width: int, mark: str, tail: int) -> str:
    if _cells(name) <= width:
        return name
    head = width - _cells(mark) - tail
    return _take(name, head) + mark + _take(name[::-1], tail)[::-1]


def _elide_parts(name: str, width: int, mark: str, tail: int) -> str | None:
    """The same between two parts of a dotted name; None where nothing is left of one side."""
    if _cells(name) <= width or "." not in name:
        return _elide(name, width, mark, tail)
    first, last = _take(name, width - _cells(mark) - tail), _take(name[::-1], tail)[::-1]
    return first[: first.rindex(".") + 1] + mark + last[last.index(".") :] if "." in first and "." in last else None


def _take(text: str, cells: int) -> str:
    """The longest beginning of ``text`` that fits into ``cells``."""
    if text.isascii():
        return text[: max(cells, 0)]
    used = 0
    for index, char in enumerate(text):
        used += cell_len(char)
        if used > cells:
            return text[:index]
    return text


def _number(short: list[str], names: Sequence[str], width: int) -> list[str]:
    order = {name: index for index, name in enumerate(dict.fromkeys(names), start=1)}
    ends = [f"#{order[name]}" for name in names]
    times = Counter(short)
    return [
        _take(label, width - cell_len(end)) + end if times[label] > 1 else label
        for label, end in zip(short, ends, strict=True)
    ]


# --- Commands to copy -------------------------------------------------------------------------------------------------


def broken(command: str, width: int) -> list[str]:
    """The command in lines of at most ``width`` that a shell still reads as one.

    What is longer than a line by itself stays whole: a broken path could not be pasted.
    """
    lines = [""]
    for phrase in _phrases(shlex.split(command)):
        longer = f"{lines[-1]} {phrase}".lstrip()
        # Two cells are kept for the backslash that continues a line.
        if lines[-1] and cell_len(longer) > width - 2:
            lines.append(phrase)
        else:
            lines[-1] = longer
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


_CALLS = {"scan": "scan(model, batches", "recalibrate": "recalibrate(model, batches", "convert": "convert(model"}
_SAVED = "--output"


def as_call(command: str) -> str | None:
    """The call of a function that does what a command does; None where no function does.

    Args:
        command: Of which only the options count: ``"bnprobe scan model.py --batch-size 4"``.
    """
    words = shlex.split(command)
    if len(words) < 2 or words[1] not in _CALLS or "--finetune" in words:
        return None
    given: dict[str, list[str]] = {}
    options = iter(words[2:])
    for word in options:
        if word.startswith("-"):
            given.setdefault(word, []).append(next(options, ""))
    if _SAVED in given:
        return f"report.save({given[_SAVED][0]!r})"
    layers = given.pop("--layers", None)
    parts = [_CALLS[words[1]]]
    if layers is not None:
        parts.append(repr(layers) if words[1] == "convert" else f"layers={layers!r}")
    named = {name: values[-1] for name, values in given.items() if name.startswith("--")}
    parts += [f"{argument_of(name)}={_literal(value)}" for name, value in named.items()]
    return f"bnprobe.{', '.join(parts)})"


def _literal(text: str) -> str:
    """A value of an option as Python writes it."""
    if "," in text:
        return f"[{', '.join(map(_literal, text.split(',')))}]"
    try:
        float(text)
    except ValueError:
        return repr(text)
    return text


def _phrases(words: list[str]) -> list[str]:
    """The words, quoted, an option together with its value."""
    phrases: list[str] = []
    after_option = False
    for word in words:
        is_option = word.startswith("--") or word == "-o"
        if after_option and not is_option:
            phrases[-1] += f" {shlex.quote(word)}"
        else:
            phrases.append(shlex.quote(word))
        after_option = is_option and "=" not in word
    return phrases

"""The picture of a report in README.md: ``python docs/picture.py`` writes docs/images/report.svg.

It shows parts of what the command prints, in colour, as an SVG with nothing in it that is loaded from elsewhere.
"""

from __future__ import annotations

import html
import os
import pty
import re
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMAND = "scan sample_configs/digits/sorted.yaml"
PICTURE = Path(__file__).parent / "images" / "report.svg"
WIDTH = 80
CHARACTER = 12.2  # width of one in rich's pictures
LEFT_OUT = "  ⋮"
PARTS = (  # first and last line of each part
    (r"✗ \d+ of \d+ layers", r"n_eq: "),
    (r" +✗ Non-i.i.d. batches", r" +sources; then continue training"),
    (r"To convert the layers", r" +--blend"),
)


def shown(output: str) -> str:
    """The parts of a printed report that are in the picture.

    Raises:
        ValueError: A part is not there.
    """
    lines = output.splitlines()
    plain = [Text.from_ansi(line).plain for line in lines]
    parts = []
    for first, last in PARTS:
        begin = next((number for number, line in enumerate(plain) if re.match(first, line)), None)
        rest = range(begin + 1, len(plain)) if begin is not None else ()
        end = next((number for number in rest if re.match(last, plain[number])), None)
        if begin is None or end is None:
            raise ValueError(f'The report has no part from "{first}" to "{last}": mend PARTS in {__file__}')
        parts.append("\n".join(lines[begin : end + 1]))
    return f"\n{LEFT_OUT}\n".join(parts)


def text_of(svg: str) -> str:
    """The text in a picture, row by row; blanks are not drawn, but follow from where the pieces of a row stand."""
    rows: dict[str, str] = {}
    for x, y, text in re.findall(r'<text class="[\w-]+-r\d+" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', svg):
        column = round(float(x) / CHARACTER)
        rows[y] = rows.get(y, "").ljust(column) + html.unescape(text).replace("\xa0", " ")
    return "\n".join(rows.values())


def svg(output: str) -> str:
    """A printed report as an SVG."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    console.print(Text.from_ansi(shown(output)), soft_wrap=True)
    text = console.export_svg(title=f"bnprobe {COMMAND}", unique_id="report")
    return re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL).replace("Fira Code, monospace", "monospace")


def printed() -> str:
    """What the command prints to a terminal."""
    chunks: list[bytes] = []

    def read(descriptor: int) -> bytes:
        chunks.append(os.read(descriptor, 65536))
        return chunks[-1]

    os.environ |= {"COLUMNS": str(WIDTH), "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "bnprobe", *COMMAND.split()]
    pty.spawn(["sh", "-c", 'exec "$0" "$@" 2>/dev/null', *command], read)
    return b"".join(chunks).decode().replace("\r\n", "\n")


if __name__ == "__main__":
    PICTURE.write_text(svg(printed()), encoding="utf-8")

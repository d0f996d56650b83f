"""The printed output that README.md shows: found by the comments in front of it, compared with what a run prints.

``<!-- bnprobe ARGUMENTS -->`` stands before a whole output, ``<!-- from bnprobe ARGUMENTS -->`` before parts of one,
with a line of three dots where lines were left out. A command that writes (``-o NAME.safetensors``) runs before those
that name what it wrote (``NAME.``).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from functional.command import REPOSITORY

README = REPOSITORY / "README.md"
BLOCK = re.compile(
    r"<!-- (?P<part>from )?bnprobe (?P<command>[^\n]+?) -->\n```(?:text)?\n(?P<text>.*?)(?=^```)",
    re.DOTALL | re.MULTILINE,
)
LEFT_OUT = "..."
WORD = re.compile(r"[a-z][a-z_]+(?:\.?\w+)*")
# Times differ from run to run, and last digits from processor to processor: the words and their order must not.
HEADER = ("device", "measured", "emulation", " " * 11)


@dataclass(frozen=True)
class Block:
    """A fenced block of output.

    Attributes:
        command: Arguments of bnprobe.
        partial: Lines may be left out.
    """

    command: str
    partial: bool
    text: str

    @property
    def output(self) -> str | None:
        """How the names of the files begin that the command writes; None: it writes none."""
        found = re.search(r" -o (\S+\.)safetensors$", self.command)
        return found and found[1]

    @property
    def parts(self) -> list[str]:
        """What stands between the dots."""
        return [part for part in re.split(rf"^{re.escape(LEFT_OUT)}\n", self.text, flags=re.MULTILINE) if part.strip()]


def blocks() -> list[Block]:
    """All blocks, in order."""
    found = BLOCK.finditer(README.read_text(encoding="utf-8"))
    return [Block(match["command"], match["part"] is not None, match["text"]) for match in found]


def makers(block: Block) -> list[Block]:
    """The blocks whose commands write what this one names."""
    return [maker for maker in blocks() if maker.output and block.output is None and maker.output in block.command]


def words(text: str) -> list[str]:
    """The words of all lines but those of the header."""
    return [word for word, _ in _placed(text)]


def place(part: str, output: str, start: int) -> tuple[int, int] | None:
    """First and last line (exclusive) of ``output``, from ``start`` on, that hold the words of ``part`` in a row."""
    wanted, given = words(part), [(word, line) for word, line in _placed(output) if line >= start]
    for first in range(len(given) - len(wanted) + 1):
        if [word for word, _ in given[first : first + len(wanted)]] == wanted:
            return given[first][1], given[first + len(wanted) - 1][1] + 1
    return None


def rewritten(block: Block, output: str) -> str:
    """The block with the figures of ``output``; parts whose words are not there stay as they are."""
    if not block.partial:
        return output
    lines, text, start = output.splitlines(keepends=True), block.text, 0
    for part in block.parts:
        found = place(part, output, start)
        if found is not None:
            text, start = text.replace(part, "".join(lines[slice(*found)]), 1), found[1]
    return text


def update(block: Block, output: str) -> Block:
    """The block as it stands in README.md, after writing it anew where ``BNPROBE_UPDATE_GOLDEN=1`` asks for it."""
    if os.environ.get("BNPROBE_UPDATE_GOLDEN") != "1":
        return block
    text = rewritten(block, output)
    readme, fence = README.read_text(encoding="utf-8"), f"bnprobe {block.command} -->\n```\n"
    README.write_text(readme.replace(fence + block.text, fence + text, 1), encoding="utf-8")
    return Block(block.command, block.partial, text)


def _placed(text: str) -> list[tuple[str, int]]:
    lines = enumerate(text.splitlines())
    return [(word, number) for number, line in lines if not line.startswith(HEADER) for word in WORD.findall(line)]

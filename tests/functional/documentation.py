"""The printed output that README.md and docs/ show: found by the comments before it, compared with what a run prints.

``<!-- bnprobe ARGUMENTS -->`` stands before a whole output, ``<!-- from bnprobe ARGUMENTS -->`` before parts of one,
with a line of three dots where lines were left out. A command that writes (``-o NAME.safetensors``, ``-o NAME.json``)
runs before those that name what it wrote (``NAME.``).
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from functional.command import REPOSITORY, Result, Workspace

README = REPOSITORY / "README.md"
PAGES = (README, *sorted((REPOSITORY / "docs").rglob("*.md")))
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
        page: The file that shows it.
        command: Arguments of bnprobe.
        partial: Lines may be left out.
    """

    page: Path
    command: str
    partial: bool
    text: str

    @property
    def parts(self) -> list[str]:
        """What stands between the dots."""
        return [part for part in re.split(rf"^{re.escape(LEFT_OUT)}\n", self.text, flags=re.MULTILINE) if part.strip()]


def blocks(pages: Iterable[Path] = PAGES) -> list[Block]:
    """All blocks of the pages, in order."""
    return [
        Block(page, match["command"], match["part"] is not None, match["text"])
        for page in pages
        for match in BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


def chains() -> list[tuple[str, ...]]:
    """Every command once: a command that writes files, followed by those that read them, is one chain."""
    commands = list(dict.fromkeys(block.command for block in blocks()))
    written = {command: prefix for command in commands if (prefix := _written(command))}
    found = {command: [command] for command in commands}
    for command in commands:
        for maker, prefix in written.items():
            if command not in written and prefix in command:
                found[maker].append(command)
                del found[command]
    return [tuple(chain) for chain in found.values()]


class Reader:
    """Runs commands as a reader of the documentation would, in a folder of their own, each once."""

    def __init__(self, folder: Path) -> None:
        for source in ("sample_configs", "docs/examples"):
            shutil.copytree(REPOSITORY / source, folder / source, ignore=shutil.ignore_patterns("__pycache__"))
        self._workspace = Workspace(folder)
        self._seen: dict[str, Result] = {}

    def run(self, command: str) -> Result:
        """What a command left behind."""
        if command not in self._seen:
            self._seen[command] = self._workspace.run(*shlex.split(command), COLUMNS="80", PYTHONIOENCODING="utf-8")
        return self._seen[command]


def _written(command: str) -> str | None:
    """How the names of the files begin that a command writes; None: it writes none."""
    found = re.search(r" -o (\S+\.)(safetensors|json)$", command)
    return found and found[1]


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
    """The block with the lines of ``output``; of parts whose words changed, the lines that are most like them."""
    if not block.partial:
        return output
    lines, text, start = output.splitlines(keepends=True), block.text, 0
    for part in block.parts:
        first, last = place(part, output, start) or _nearest(part, lines, start)
        text, start = text.replace(part, "".join(lines[first:last]), 1), last
    return text


def update(block: Block, output: str) -> Block:
    """The block as it stands in its page, after writing it anew where ``BNPROBE_UPDATE_GOLDEN=1`` asks for it."""
    if os.environ.get("BNPROBE_UPDATE_GOLDEN") != "1":
        return block
    text = rewritten(block, output)
    page = block.page.read_text(encoding="utf-8")
    fences = [f"bnprobe {block.command} -->\n```{kind}\n" for kind in ("", "text")]
    for fence in fences:
        page = page.replace(fence + block.text, fence + text, 1)
    block.page.write_text(page, encoding="utf-8")
    return replace(block, text=text)


def _nearest(part: str, lines: list[str], start: int) -> tuple[int, int]:
    """The lines from ``start`` on whose words are most like those of a part, as many or a few more or less."""
    wanted, size = words(part), len(part.splitlines())
    best, found = 0.0, (start, min(start + size, len(lines)))
    for first in range(start, len(lines)):
        for last in range(first + max(1, size - 3), min(first + size + 3, len(lines)) + 1):
            likeness = difflib.SequenceMatcher(None, wanted, words("".join(lines[first:last])), autojunk=False).ratio()
            if likeness > best:
                best, found = likeness, (first, last)
    return found


def _placed(text: str) -> list[tuple[str, int]]:
    lines = enumerate(text.splitlines())
    return [(word, number) for number, line in lines if not line.startswith(HEADER) for word in WORD.findall(line)]

"""Write a report to the terminal or to a file."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from bnprobe.errors import OutputError
from bnprobe.files import require_writable, write_whole
from bnprobe.report import Renderer, RenderOptions


def check_writable(output: Path | None) -> None:
    """Reject an output that cannot be written, before anything is measured.

    Raises:
        OutputError: The folder is missing or read-only, or the path is a folder.
    """
    if output is not None:
        require_writable(output)


def deliver(
    document: object, render: Renderer, output: Path | None = None, show_all: bool = False, summary: str = ""
) -> None:
    """Write the rendered document to ``output`` and the summary to stderr; without ``output``, to stdout."""
    if output is None:
        _print(render(document, _terminal_options(show_all)))
        return
    write_whole(output, render(document, RenderOptions(show_all=show_all, command=typed_command())))
    print(f"{summary}; report written to {output}", file=sys.stderr)


def _print(text: str) -> None:
    """Write to stdout. A reader that closes the pipe early (``| head``) is not an error.

    Raises:
        OutputError: The text could not be written, e.g. to a full disk.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # The rest of the buffer must not fail again when Python closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OutputError(f"The report could not be written to stdout: {error.strerror}.") from None


def _terminal_options(show_all: bool) -> RenderOptions:
    stdout = sys.stdout
    colored = stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return RenderOptions(
        width=shutil.get_terminal_size(fallback=(80, 24)).columns,
        color=colored,
        show_all=show_all,
        unicode=_can_encode("✗▁█│×", stdout.encoding),
        command=typed_command(),
    )


def _can_encode(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def typed_command() -> str:
    """The command line as typed."""
    return shlex.join(["bnprobe", *sys.argv[1:]])

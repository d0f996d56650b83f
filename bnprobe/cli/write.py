"""Write a report to the terminal or to a file."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bnprobe.errors import OutputError
from bnprobe.records import Report
from bnprobe.reports import FORMATS, RenderOptions
from bnprobe.reports.figures import count


def check_writable(output: Path | None) -> None:
    """Refuse an output that could not be written, before anything is measured.

    Raises:
        OutputError: The folder is missing or read-only, or the file is a folder.
    """
    if output is None:
        return
    if output.is_dir():
        raise OutputError(f"--output {output} is a folder; give a file name in it.")
    if _is_special(output):
        return
    folder = (output.resolve() if output.is_symlink() else output).parent
    if not folder.is_dir():
        raise OutputError(f"The folder {folder} of --output does not exist; create it first.")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"The folder {folder} of --output cannot be written to.")


def write_report(report: Report, format_: str, output: Path | None, show_all: bool) -> None:
    """Render the report; to ``output`` if given, else to stdout."""
    partial = f"PARTIAL, {report.scan.stopped}: " if report.scan.partial else ""
    layers = count(report.summary.layers, "layer")
    cause = f" ({report.diagnoses[0].cause.replace('_', ' ')} first)" if report.diagnoses else ""
    summary = f"{partial}{report.summary.flagged} of {layers} flagged{cause}"
    deliver(lambda options: FORMATS[format_](report, options), output, show_all, summary)


def deliver(render: Callable[[RenderOptions], str], output: Path | None, show_all: bool, summary: str) -> None:
    """Write what is rendered to ``output`` if given, and the summary to stderr; else to stdout."""
    if output is None:
        _print(render(_terminal_options(show_all)))
        return
    write_whole(output, render(RenderOptions(show_all=show_all, command=_command())))
    print(f"{summary}; report written to {output}", file=sys.stderr)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: a neighbour is written first, then renamed. Links are followed.

    Raises:
        OutputError: It could not be written; what was there before is still there.
    """
    try:
        if _is_special(path):
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path.resolve(), text)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}.") from None


def _is_special(path: Path) -> bool:
    """A pipe or device, such as /dev/null, which must be written to and never be replaced."""
    return path.exists() and not path.is_file()


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        temporary = Path(file.name)
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(path)
        except BaseException:  # Ctrl-C too
            temporary.unlink(missing_ok=True)
            raise


def _print(text: str) -> None:
    """Write to stdout; a reader that has seen enough (``| head``) is no error.

    Raises:
        OutputError: It could not be written, e.g. to a full disk.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer must not fail again when Python closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise OutputError(f"The report could not be written to stdout: {error.strerror}.") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _terminal_options(show_all: bool) -> RenderOptions:
    stdout = sys.stdout
    colored = stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return RenderOptions(
        width=shutil.get_terminal_size(fallback=(80, 24)).columns,
        color=colored,
        show_all=show_all,
        unicode=_can_encode("✗▁█│×", stdout.encoding),
        command=_command(),
    )


def _can_encode(text: str, encoding: str | None) -> bool:
    try:
        text.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _command() -> str:
    return shlex.join(["bnprobe", *sys.argv[1:]])

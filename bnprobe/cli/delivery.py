"""Where the report of a command goes: to stdout, to a file, or in several formats to the files of a folder."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bnprobe.cli.console import ci_folder, print_report, typed_command
from bnprobe.cli.options import TERMINAL
from bnprobe.cli.streams import say, start, write_out
from bnprobe.errors import OutputError, UsageError
from bnprobe.files import make_folder, refuse_input, require_folder, require_new, write_all
from bnprobe.paths import is_folder, is_special, placed, real
from bnprobe.printable import escaped_lines
from bnprobe.report import FORMATS, Renderer, RenderOptions, renderer

if TYPE_CHECKING:
    from bnprobe.records import Report, SweepReport

_Scanned = TypeVar("_Scanned", "Report", "SweepReport")

STDOUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
"""Names of stdout among files."""


def with_command(report: _Scanned) -> _Scanned:
    """The report of a scan or sweep, with the command line that made it."""
    return replace(report, scan=replace(report.scan, command=typed_command()))


class Delivery:
    """The report of one command in the formats asked for. Where all of them go to files, stdout gets it for people.

    Args:
        command: Name of the command, which files in a folder are named after.
        document: Type of what is to be rendered, of ``bnprobe.report.DOCUMENTS``.
        formats: Names of the formats; none: that for the terminal.
        output: The file; None: stdout, unless there is a folder.
        folder: The folder of the files, which need not exist.
        force: Whether files may be replaced.
        show_all: Whether reports show every layer.
        verbose: Whether the report for people is the whole one.
        typed: The command that suggestions are variants of; None: the one that runs; empty: not known.

    Raises:
        UsageError: A format does not support the document, needs a package that is not installed, or would be printed
            on a terminal that cannot show it; or where several formats are to go is not said, or said twice.
    """

    def __init__(
        self,
        command: str,
        document: type,
        formats: Sequence[str] | None = None,
        *,
        output: Path | None = None,
        folder: Path | None = None,
        force: bool = False,
        show_all: bool = False,
        verbose: bool = False,
        typed: str | None = None,
    ) -> None:
        names = list(dict.fromkeys(formats or [TERMINAL]))
        renderers = {name: renderer(name, document) for name in names}
        if output is not None and folder is not None:
            raise UsageError("--output and --output-dir both say where the report goes: give one.")
        if folder is None and len(names) > 1:
            raise UsageError(f"--format {' --format '.join(names)} needs a file for each: give --output-dir DIR.")
        self._folder, self._force = folder, force
        self._options = RenderOptions(show_all=show_all, verbose=verbose)
        self._names, self._for_people = names, renderer(TERMINAL, document)
        self._typed = typed_command() if typed is None else typed
        self._stdout: Renderer | None = None
        self._files: dict[Path, Renderer] = {}
        if folder is not None:
            self._files = {folder / f"{command}{FORMATS[name].ending}": renderers[name] for name in names}
        elif output is not None:
            self._files = {output: renderers[names[0]]}
        else:
            self._stdout = renderers[names[0]]

    def check(self, inputs: Iterable[str | Path] = (), also: Collection[Path] = ()) -> None:
        """Reject files that cannot be written or that exist, before anything is measured.

        Args:
            inputs: Files that the command reads, which its report never replaces.
            also: Files of ``--write-baseline``.

        Raises:
            OutputError: A folder is missing or read-only, the path is a folder, a file exists and is not to be
                replaced, or is one of the inputs, or two are one; or there is no file and stdout is closed.
            UsageError: There is no file, stdout is a terminal, and the format is none that a terminal shows.
        """
        if self._stdout is not None:
            self._check_stdout()
        if self._folder is not None:
            require_folder(self._folder, self._option)
        files = [path for path in self._files if self._folder is None or is_folder(self._folder)]
        require_new([path for path in files if str(path) not in STDOUT], self._force, self._option)
        require_new(also, self._force, "--write-baseline")
        for option, paths in ((self._option, self._files), ("--write-baseline", also)):
            for path in paths:
                refuse_input(path, inputs, option)
        reports = {real(path) for path in self._files if not is_special(path)}
        for path in also:
            if real(path) in reports:
                raise OutputError(f"--write-baseline {path} is the file of the report, too; give another name.")

    def _check_stdout(self) -> None:
        stdout, opens = start().stdout, FORMATS[self._names[0]].opens
        if stdout is None:
            raise OutputError("stdout is closed: give --output FILE for the report.")
        if opens and stdout.isatty():
            raise UsageError(
                f"--format {self._names[0]} makes a file for {opens}, and stdout is a terminal: give --output-dir DIR."
            )

    def deliver(self, document: object, also: Mapping[Path, str] | None = None) -> None:
        """Render the document and write all files or none, then what goes to stdout.

        Args:
            document: What the command returned.
            also: Files of ``--write-baseline`` and what they hold.

        Raises:
            OutputError: Something could not be written, or has come into being meanwhile and is not to be replaced.
        """
        texts = self.write(document, also)
        streamed = [text for path, text in texts.items() if str(path) in STDOUT]
        for text in streamed:
            write_out(text)
        if not streamed and start().stdout is not None:
            print_report(document, self._stdout or self._for_people, self._options, self._typed)
        if texts:
            say(f"Report written to {', '.join(map(str, texts))}.")
        if also:
            say(f"Baseline written to {', '.join(map(str, also))}.")

    def write(self, document: object, also: Mapping[Path, str] | None = None) -> dict[Path, str]:
        """Render the document and write all files or none.

        Args:
            document: What the command returned.
            also: Files of ``--write-baseline`` and what they hold.

        Returns:
            What is in the files, and what stdout is to get by the name of a file.

        Raises:
            OutputError: Something could not be written, or has come into being meanwhile and is not to be replaced.
        """
        options = replace(self._options, folder=ci_folder(), command=self._typed)
        texts = {path: escaped_lines(render(document, options)) for path, render in self._files.items()}
        written = {path: text for path, text in texts.items() if str(path) not in STDOUT}
        if self._folder is not None:
            make_folder(placed(self._folder), self._option)
        contents = {**written, **(also or {})}
        if contents:
            write_all({placed(path): text for path, text in contents.items()}, self._force, self._option)
        return texts

    @property
    def _option(self) -> str:
        return "--output" if self._folder is None else "--output-dir"

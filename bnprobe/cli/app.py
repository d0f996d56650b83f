"""The ``bnprobe`` command and its subcommands."""

from __future__ import annotations

import copy
import functools
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core
import typer.main

from bnprobe._version import __version__
from bnprobe.cli.command import Command, clean_usage, writing_help
from bnprobe.cli.compare import compare
from bnprobe.cli.config import config
from bnprobe.cli.convert import convert
from bnprobe.cli.drift import drift
from bnprobe.cli.explain import explain
from bnprobe.cli.export import export
from bnprobe.cli.init import init
from bnprobe.cli.lab import lab
from bnprobe.cli.lint import lint
from bnprobe.cli.options import complete_help
from bnprobe.cli.processes import (
    Ends,
    leave_when_interrupted,
    put_back_interrupts,
    refuse_together,
    run_together,
    several_processes,
    was_interrupted,
)
from bnprobe.cli.profile import profile
from bnprobe.cli.recalibrate import recalibrate
from bnprobe.cli.scan import scan
from bnprobe.cli.show import show
from bnprobe.cli.streams import forget_odd_sizes, occupy_closed_streams, say, write_out
from bnprobe.cli.sweep import SweepCommand, sweep
from bnprobe.cli.table import table
from bnprobe.cli.verify import verify
from bnprobe.cli.watch import watch
from bnprobe.docstrings import docstring
from bnprobe.errors import (
    EXIT_ERROR,
    EXIT_NOTHING,
    BnprobeError,
    NothingToProbeError,
    ProcessError,
    UsageError,
    UserCodeError,
    message_of,
    reason_of,
)


class _Commands(typer.core.TyperGroup):
    """The group of subcommands; typer alone would end a Ctrl-C silently, with an exit code of its own."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with clean_usage():
            return super().make_context(*args, **extra)

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.default = False  # typer would import pydantic to convert None
        return option

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with writing_help():
            super().format_help(ctx, formatter)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        refuse_together(name)
        complete_help(command)
        return name, command, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            with clean_usage():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise NothingToProbeError("Interrupted.") from None
        except EOFError as error:  # typer would take it for the end of input to a prompt, but there is none
            raise RuntimeError("the end of a file came too early") from error


def _flowing(text: str) -> str:
    """Paragraphs of one line each, whose breaks are the terminal's."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


app = typer.Typer(
    name="bnprobe",
    cls=_Commands,
    help="Find the Batch Normalization layers that behave differently in training and at inference, and say why.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
)
for _each in (
    scan,
    sweep,
    lint,
    convert,
    recalibrate,
    verify,
    compare,
    profile,
    drift,
    table,
    lab,
    show,
    watch,
    export,
    explain,
    config,
    init,
):
    app.command(cls=SweepCommand if _each is sweep else Command, help=_flowing(docstring(_each)))(_each)


@functools.cache
def _command_line(asked: str | None) -> Any:
    """The command with its subcommands, of which only the one asked for has its arguments and options.

    Typer makes them anew whenever it is asked to run one; to make those of all takes a twentieth of a second.
    """
    part = copy.copy(app)
    part.registered_commands = [_made_for(asked, each) for each in app.registered_commands]
    return typer.main.get_command(part)


def _made_for(asked: str | None, command: typer.models.CommandInfo) -> typer.models.CommandInfo:
    assert command.callback is not None
    name, found = command.callback.__name__, copy.copy(command)
    if name != asked:
        found.name, found.callback = name, _nothing
    return found


def _nothing() -> None:
    """Stands in for a command that does not run."""


def main() -> None:
    """Run the command line, in one process or as one of several."""
    occupy_closed_streams()
    forget_odd_sizes()
    try:
        together = several_processes()
    except UsageError as error:
        _fail(error.exit_code, f"bnprobe: error: {error}", _alone)
    if together:
        run_together(_run)
    leave_when_interrupted()
    try:
        _run(_alone)
    finally:
        put_back_interrupts()


def _alone(code: int) -> None:
    return None


def _run(ends: Ends) -> None:
    """Run the command line. Errors that bnprobe raises on purpose become messages and exit codes.

    Any other exception is a bug in bnprobe. It must not exit with 1, Python's default, because 1 stands for findings.

    Args:
        ends: Called with the exit code of an error before its message is printed; see ``processes.run_together``.
    """
    try:
        _require_folder()
        asked = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
        _command_line(asked)(prog_name="bnprobe")
    except BnprobeError as error:
        frames = error.frames if isinstance(error, UserCodeError | ProcessError) else ""
        _fail(error.exit_code, f"bnprobe: error: {error}\n{frames}", ends)
    except MemoryError as error:
        _fail(EXIT_ERROR, f"bnprobe: error: There is not enough memory. {message_of(error)}", ends)
    except Exception as error:
        if was_interrupted():
            _fail(EXIT_NOTHING, "bnprobe: error: Interrupted.", ends)
        if isinstance(error, OSError) and error.filename is not None:
            place, reason = os.fsdecode(error.filename), reason_of(error)
            _fail(EXIT_ERROR, f"bnprobe: error: The operating system refused to go on with {place}: {reason}.", ends)
        text = "bnprobe: internal error; please report it with the lines above."
        _fail(EXIT_ERROR, traceback.format_exc() + text, ends)


def _require_folder() -> None:
    """Refuse a working directory that does not exist any more: no path could be looked up.

    Raises:
        UsageError: It was deleted.
    """
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(f"The working directory cannot be used ({reason_of(error)}): change to another one.") from None


def _fail(code: int, text: str, ends: Ends) -> NoReturn:
    """Print the reason, unless another process has done so, and exit."""
    earlier = ends(code)
    if earlier is None:
        say(text.rstrip())
    sys.exit(code if earlier is None else earlier)


def _print_version(asked: bool) -> None:
    if asked:
        write_out(f"bnprobe {__version__}\n")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass

"""The ``bnprobe`` command and its subcommands."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
import typer.core

import bnprobe
from bnprobe.cli.explain import explain
from bnprobe.cli.init import init
from bnprobe.cli.lint import lint
from bnprobe.cli.scan import scan
from bnprobe.cli.sweep import SweepCommand, sweep
from bnprobe.errors import EXIT_ERROR, BnprobeError, NothingToProbeError, UserCodeError


class _Commands(typer.core.TyperGroup):
    """The subcommands; typer itself would end a Ctrl-C with an exit code of its own and no word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise NothingToProbeError("Interrupted.") from None
        except EOFError as error:  # would be taken for the end of an answer that was asked for: nothing is
            raise RuntimeError("the end of a file came too early") from error


app = typer.Typer(
    name="bnprobe",
    cls=_Commands,
    help="Find the Batch Normalization layers that behave differently in training and at inference, and say why.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
)
app.command()(scan)
app.command(cls=SweepCommand)(sweep)
app.command()(lint)
app.command()(explain)
app.command()(init)


def main() -> None:
    """Run the command line; errors that bnprobe raises on purpose become messages and exit codes.

    Any other exception is a defect of bnprobe: it must not end in the exit code of findings, as Python would have it.
    """
    try:
        app()
    except BnprobeError as error:
        print(f"bnprobe: error: {error}", file=sys.stderr)
        if isinstance(error, UserCodeError) and error.frames:
            print(error.frames.rstrip(), file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        print("bnprobe: internal error; please report it with the lines above.", file=sys.stderr)
        sys.exit(EXIT_ERROR)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"bnprobe {bnprobe.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass

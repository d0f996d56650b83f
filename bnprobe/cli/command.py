"""What every command does besides its own work: it keeps stdout for the report, and messages on usage clean."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer.core

from bnprobe.cli.processes import is_main
from bnprobe.cli.streams import own_stdout, writing_to
from bnprobe.errors import UserCodeError
from bnprobe.paths import from_here
from bnprobe.printable import message
from bnprobe.wording import named_command


class Command(typer.core.TyperCommand):
    """A command whose stdout holds what it writes itself, and nothing else."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            UserCodeError: The user's code called exit() where nobody reckoned with it; that must not end bnprobe
                silently, with the exit code of a clean scan.
        """
        named_command(str(ctx.info_name))
        try:
            with from_here(), own_stdout(shared=not is_main()):
                return super().invoke(ctx)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise UserCodeError("running the command", error) from error

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        with writing_help():
            super().format_help(ctx, formatter)


@contextmanager
def writing_help() -> Iterator[None]:
    """Turn a stdout that help cannot be written to into an error; if its reader has left, rich would exit with 1."""
    with writing_to(sys.stdout), suppress(SystemExit):
        yield


@contextmanager
def clean_usage() -> Iterator[None]:
    """Clean the messages of errors in usage, which quote what was typed; typer prints them."""
    try:
        yield
    except Exception as error:
        said = getattr(error, "format_message", None)  # that of an error in usage; where it is depends on typer
        if said is not None:
            text = message(said())
            error.format_message = lambda: text  # type: ignore[attr-defined]
        raise

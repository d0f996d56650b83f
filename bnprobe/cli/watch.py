"""``bnprobe watch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnprobe.cli import options


def watch(
    log: Annotated[
        Path, typer.Argument(help="What was given to bnprobe.Monitor as log: a folder or a .jsonl file.", metavar="LOG")
    ],
    show_all: options.ShowAll = False,
) -> None:
    """Watch the log of a bnprobe.Monitor while a model trains: loss in both modes, the worst layers, what was found.

    In a terminal the view follows the log until Ctrl-C. Elsewhere the state is printed once.

    Exit codes: 0 shown, whatever was found; 2 there is no such log.
    """
    from bnprobe.cli.console import follow
    from bnprobe.cli.processes import importing

    with importing():
        from bnprobe.monitor.log import LogReader
        from bnprobe.report import RenderOptions, watch

    reader = LogReader(log)
    follow(reader.update, lambda shown: watch.render(reader.log, shown), RenderOptions(show_all=show_all))

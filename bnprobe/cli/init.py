"""``bnprobe init``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

STARTER = ("model.py", "spec.yaml")
"""The starter files, shipped in ``bnprobe/starter``."""


def init(
    folder: Annotated[Path, typer.Argument(help="Where to write; created if missing.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
) -> None:
    """Write a commented starter model.py and spec.yaml that scan at once."""
    import shlex
    from importlib.resources import files

    from bnprobe.cli.streams import write_out
    from bnprobe.errors import OutputError, reason_of
    from bnprobe.files import write_whole
    from bnprobe.printable import escaped

    existing = [folder / name for name in STARTER if os.path.lexists(folder / name)]
    if existing and not force:
        raise OutputError(f"{existing[0]} already exists; choose another folder, or give --force to overwrite it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {folder} could not be created: {reason_of(error)}.") from None
    for name in STARTER:
        write_whole(folder / name, files("bnprobe").joinpath("starter", name).read_text(encoding="utf-8"))
        write_out(f"wrote {escaped(str(folder / name))}\n")
    write_out(f"next: bnprobe scan {escaped(shlex.quote(str(folder / 'spec.yaml')))}\n")

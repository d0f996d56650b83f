"""``bnprobe init``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from bnprobe.cli import options
from bnprobe.cli.processes import importing
from bnprobe.errors import UsageError

STARTER = ("model.py", "spec.yaml")
"""The starter files, shipped in ``bnprobe/starter``."""

PROJECT = "A spec for a project as it stands"


def init(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where to write; created if missing.")] = Path(),
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    from_: Annotated[
        str | None,
        options.option(PROJECT, "--from", "Write a spec.yaml that scans this, a TARGET of bnprobe scan.", "TARGET"),
    ] = None,
    checkpoint: options.Checkpoint = None,
    key: options.Key = None,
    strip_prefix: options.StripPrefix = None,
    model_arg: options.ModelArg = None,
    unsafe_load: options.UnsafeLoad = False,
    data: options.Data = None,
    eval_data: options.EvalData = None,
    batch_size: options.BatchSize = None,
    input_shape: options.InputShape = None,
    seed: options.Seed = None,
) -> None:
    """Write a commented starter model.py and spec.yaml that scan at once; or, with --from, a spec for your project."""
    from importlib.resources import files

    given = {name: value for name, value in options.overrides(context).items() if value is not None}
    names = ("spec.yaml",) if from_ is not None else STARTER
    if from_ is None and given:
        raise UsageError("These options say what to write a spec for: name the project with --from TARGET.")
    _refuse_existing(folder, names, force)
    if from_ is not None:
        with importing():
            from bnprobe.commands.init import spec_for
        from bnprobe.cli.console import typed_command
        from bnprobe.config.load import build_spec

        text, to_fill_in = spec_for(build_spec(from_, given), typed_command(), folder)
        _write(folder, {"spec.yaml": text}, to_fill_in)
        return
    starter = files("bnprobe").joinpath("starter")
    _write(folder, {name: starter.joinpath(name).read_text(encoding="utf-8") for name in names})


def _refuse_existing(folder: Path, names: tuple[str, ...], force: bool) -> None:
    from bnprobe.errors import OutputError

    existing = [folder / name for name in names if os.path.lexists(folder / name)]
    if existing and not force:
        raise OutputError(f"{existing[0]} already exists; choose another folder, or give --force to overwrite it.")


def _write(folder: Path, texts: dict[str, str], to_fill_in: str | None = None) -> None:
    import shlex

    from bnprobe.cli.streams import write_out
    from bnprobe.errors import OutputError, reason_of
    from bnprobe.files import write_whole
    from bnprobe.printable import escaped

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {folder} could not be created: {reason_of(error)}.") from None
    for name, text in texts.items():
        write_whole(folder / name, text)
        write_out(f"wrote {escaped(str(folder / name))}\n")
    if to_fill_in is not None:
        write_out(f"fill in first: {escaped(to_fill_in)}\n")
    write_out(
        f"{'next' if to_fill_in is None else 'then'}: bnprobe scan {escaped(shlex.quote(str(folder / 'spec.yaml')))}\n"
    )

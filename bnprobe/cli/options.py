"""Options that several commands share: where the model and the data come from, how they run, where the report goes.

A command names them in its signature and passes what it got to ``overrides``.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from bnprobe.errors import UsageError


def format_name(name: str) -> str:
    """The name of a report format, as ``--format`` takes it.

    Raises:
        typer.BadParameter: There is no such format.
    """
    from bnprobe.report import FORMATS

    try:
        return FORMATS[name].name
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None


def name_formats(command: Any) -> None:
    """Name the report formats in the help of a command; the table is read when the command is known, not before."""
    for parameter in command.params:
        if parameter.name == "format_":
            from bnprobe.report import FORMATS

            parameter.metavar = "|".join(FORMATS.names())


class AutocastType(str, enum.Enum):
    """Autocast dtypes."""

    bfloat16 = "bfloat16"
    float16 = "float16"


def option(panel: str, name: str, help_: str, metavar: str = "") -> typer.models.OptionInfo:
    """An option; flags have no metavar."""
    info: typer.models.OptionInfo = typer.Option(name, help=help_, rich_help_panel=panel, metavar=metavar)
    return info


TERMINAL = "terminal"
"""The format of a report unless another is asked for."""

MODEL, DATA, RUN, JUDGE, REPORT = "Model", "Data", "Measurement", "Judgement", "Report"

Target = Annotated[
    str,
    typer.Argument(
        help="model.py[:SYMBOL], package.module[:SYMBOL], timm:NAME, torchvision:NAME, or a spec file (.yaml).",
        metavar="TARGET",
    ),
]
Checkpoint = Annotated[
    str | None, option(MODEL, "--checkpoint", "Weights: safetensors, or a state dict for torch.load.", "FILE")
]
UnsafeLoad = Annotated[bool, option(MODEL, "--unsafe-load", "Let --checkpoint run pickled code, with your rights.")]
BatchSize = Annotated[
    int | None, option(DATA, "--batch-size", "Images in a micro-batch; the loader is rebuilt with it.", "N")
]
InputShape = Annotated[
    list[str] | None,
    option(DATA, "--input-shape", "Made-up images, e.g. 3,224,224; once for each input of the model.", "SHAPE"),
]
Seed = Annotated[int | None, option(DATA, "--seed", "Seed of torch, numpy and random (default 0).", "N")]
Batches = Annotated[
    int | None, option(RUN, "--batches", "Measure exactly N micro-batches (default: until all is decided).", "N")
]
MaxBatches = Annotated[int | None, option(RUN, "--max-batches", "At most N without --batches (default 256).", "N")]
Device = Annotated[
    str | None, option(RUN, "--device", "cpu, cuda, cuda:1 (default: the model's own, else CUDA if any).", "NAME")
]
Autocast = Annotated[
    AutocastType | None, option(RUN, "--autocast", "bfloat16 or float16: run under autocast.", "DTYPE")
]
PhysicalBatch = Annotated[
    int | None, option(RUN, "--physical-batch", "Images that run at once (default: from memory).", "N")
]
NoEmulate = Annotated[bool, option(RUN, "--no-emulate", "Run real micro-batches, one by one.")]
Threshold = Annotated[
    float | None,
    option(JUDGE, "--threshold", "Flag layers whose equivalent batch size is below N (default 32).", "N"),
]
Include = Annotated[list[str] | None, option(JUDGE, "--include", "Only layers whose name matches; repeatable.", "GLOB")]
Exclude = Annotated[list[str] | None, option(JUDGE, "--exclude", "No layer whose name matches; repeatable.", "GLOB")]
Select = Annotated[
    list[str] | None, option(JUDGE, "--select", "Only rules of this code or prefix, e.g. BN2; repeatable.", "CODE")
]
Ignore = Annotated[list[str] | None, option(JUDGE, "--ignore", "No rule of this code or prefix; repeatable.", "CODE")]
ReportFormat = Annotated[
    str,
    typer.Option("--format", help="Format of the report.", rich_help_panel=REPORT, parser=format_name),
]
Output = Annotated[Path | None, option(REPORT, "--output", "Write the report to FILE, whole or not at all.", "FILE")]
ShowAll = Annotated[bool, option(REPORT, "--all", "Show every layer of a large network.")]
ExitZero = Annotated[bool, option(REPORT, "--exit-zero", "Exit 0 where findings would exit 1.")]

_KEYS = {
    "checkpoint": "checkpoint.path",
    "unsafe_load": "checkpoint.unsafe_load",
    "batch_size": "data.batch_size",
    "input_shape": "data.input_shape",
    "seed": "data.seed",
    "batches": "data.batches",
    "max_batches": "scan.max_batches",
    "batch_sizes": "scan.batch_sizes",
    "device": "scan.device",
    "autocast": "scan.autocast",
    "physical_batch": "scan.physical_batch",
    "threshold": "thresholds",
    "include": "layers.include",
    "exclude": "layers.exclude",
    "select": "rules.select",
    "ignore": "rules.ignore",
    "what_if": "scan.what_if",
    "train_steps": "scan.train_steps",
    "gradients": "scan.gradients",
    "to": "repair.to",
    "layers": "repair.layers",
    "report": "repair.report",
    "seeds": "repair.seeds",
    "require": "repair.require",
    "goal": "repair.goal",
    "steps": "train.steps",
    "epochs": "train.epochs",
}
"""Where in the spec an option goes."""


def overrides(
    *,
    unsafe_load: bool = False,
    no_emulate: bool = False,
    threshold: float | None = None,
    select: list[str] | None = None,
    ignore: list[str] | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Values of options, by key of the spec; None: not given.

    Args:
        unsafe_load, no_emulate: Flags.
        threshold: Of every layer.
        select, ignore: Codes of rules; ``BN101,BN2`` will do as well as the option given twice.
        **given: Any other option, by the name of its parameter.
    """
    values = given | {
        "unsafe_load": unsafe_load or None,
        "threshold": None if threshold is None else {"*": threshold},
        "select": _codes(select),
        "ignore": _codes(ignore),
    }
    found = {_KEYS[name]: _plain(value) for name, value in values.items()}
    return {**found, "scan.emulate": False if no_emulate else None}


def _codes(given: list[str] | None) -> list[str]:
    return [code.strip() for item in given or () for code in item.split(",") if code.strip()]


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return None if value is False or value == [] else value

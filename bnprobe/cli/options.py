"""Options that several commands share: where the model and the data come from, how they run, where the report goes.

An option that sets a field of the spec names it in its declaration (``Sets``); ``overrides`` reads them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bnprobe.errors import UsageError
from bnprobe.printable import escaped

if TYPE_CHECKING:
    from bnprobe.registry import Registry


def format_name(name: str) -> str:
    """The name of a report format, as ``--format`` takes it.

    Raises:
        typer.BadParameter: There is no such format.
    """
    from bnprobe.report import FORMATS

    return row_name(FORMATS, name)


def row_name(registry: Registry[Any], name: str) -> str:
    """The name of a row, as an option takes it.

    Raises:
        typer.BadParameter: There is no such row.
    """
    try:
        registry[name]
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None
    return name


def complete_help(command: Any) -> None:
    """Fill in the help of a command what the registries hold, rows of other packages included.

    The registries are read once it is known which command runs, and not when bnprobe is imported.
    """
    options = {parameter.name: parameter for parameter in command.params}
    if "format_" in options:
        from bnprobe.report import formats_of

        names = [f"{name} (default)" if name == TERMINAL else name for name in formats_of(command.name)]
        options["format_"].help = escaped(f"{', '.join(names)}; several with --output-dir.")
    if "{frameworks}" in (getattr(options.get("target"), "help", None) or ""):
        from bnprobe.config.frameworks import FRAMEWORKS

        named = [f"{row.prefix}:{'FOLDER' if row.is_path else 'NAME'}" for row in FRAMEWORKS if row.prefix]
        options["target"].help = options["target"].help.format(frameworks=escaped(", ".join(named)))
    if command.name == "convert":
        from bnprobe.config.targets import AUTO, DEFAULT_TARGET, TARGETS

        names = [f"{name} (default)" if name == DEFAULT_TARGET else name for name in TARGETS.names()]
        options["to"].help = escaped(f"{', '.join(names)}; {AUTO}: the one that does best in a short training run.")
        rows = [f"{each.name}{'' if each.deploys else '*'}: {each.summary}" for each in TARGETS]
        heading = "What layers normalize with in training (* does not deploy as plain BN):"
        command.epilog = "\n\n".join([heading, *map(escaped, rows)])
    if command.name == "export":
        from bnprobe.config.exporters import EXPORTERS

        options["to"].help = escaped(f"{', '.join(EXPORTERS.names())}.")
        files = [f"{each.name} ({each.suffix}): {each.summary}" for each in EXPORTERS]
        command.epilog = "\n\n".join(["How the file is made:", *map(escaped, files)])


@dataclass(frozen=True)
class Sets:
    """The field of the spec that an option sets.

    Attributes:
        key: Field of the spec, e.g. "scan.device".
        convert: Converts the option's value to that of the field.
    """

    key: str
    convert: Callable[[Any], Any] = lambda value: value


def option(panel: str, name: str, help_: str, metavar: str = "") -> typer.models.OptionInfo:
    """Declare an option; flags have no metavar."""
    info: typer.models.OptionInfo = typer.Option(name, help=help_, rich_help_panel=panel, metavar=metavar)
    return info


def codes(given: list[str]) -> list[str]:
    """Codes of rules: ``BN101,BN2`` means the same as the option given twice."""
    return [code.strip() for item in given for code in item.split(",") if code.strip()]


def arguments(given: list[str]) -> dict[str, Any]:
    """Keyword arguments: ``depth=50`` is a number, ``name=r50`` a text, as in YAML.

    Raises:
        UsageError: One has no "=", or no name before it.
    """
    import yaml

    from bnprobe.config.load import load_yaml

    found: dict[str, Any] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(f"--model-arg takes NAME=VALUE, e.g. depth=50, but got {item!r}.")
        try:
            found[name.strip()] = load_yaml(value)
        except yaml.YAMLError:
            found[name.strip()] = value
        except ValueError as error:
            raise UsageError(f"--model-arg {name.strip()} cannot be used: {error}.") from None
    return found


TERMINAL = "terminal"
"""The format of a report unless another is asked for."""

MODEL, DATA, RUN, JUDGE, REPORT = "Model", "Data", "Measurement", "Thresholds and rules", "Report"

Target = Annotated[
    str,
    typer.Argument(
        help="model.py[:SYMBOL], package.module[:SYMBOL], {frameworks}, or a spec file (.yaml). SYMBOL may be a"
        " LightningModule, and the file a configuration of Hydra or LightningCLI.",
        metavar="TARGET",
    ),
]
Checkpoint = Annotated[
    str | None,
    option(MODEL, "--checkpoint", "Weights: a file of safetensors or torch.save, or a folder with one.", "PATH"),
    Sets("checkpoint.path"),
]
Key = Annotated[
    str | None,
    option(MODEL, "--key", "Where the weights are in --checkpoint, e.g. model_ema (default: what fits best).", "KEY"),
    Sets("checkpoint.key"),
]
StripPrefix = Annotated[
    str | None,
    option(MODEL, "--strip-prefix", "Remove this prefix from the names in --checkpoint, e.g. encoder.", "PREFIX"),
    Sets("checkpoint.strip_prefix"),
]
ModelArg = Annotated[
    list[str] | None,
    option(MODEL, "--model-arg", "Argument of the function that makes the model, e.g. depth=50; repeatable.", "K=V"),
    Sets("model.args", arguments),
]
UnsafeLoad = Annotated[
    bool,
    option(MODEL, "--unsafe-load", "Let --checkpoint run pickled code, with your permissions (seldom needed)."),
    Sets("checkpoint.unsafe_load"),
]
Data = Annotated[
    str | None,
    option(
        DATA,
        "--data",
        "Training data: FILE.py:SYMBOL or SYMBOL, a loader, data set, data module or function; or a file of tensors.",
        "TARGET",
    ),
    Sets("data.target"),
]
EvalData = Annotated[
    str | None,
    option(DATA, "--eval-data", "Held-out data, in the same forms.", "TARGET"),
    Sets("eval_data.target"),
]
BatchSize = Annotated[
    int | None,
    option(DATA, "--batch-size", "Samples in a micro-batch; the loader is rebuilt with it.", "N"),
    Sets("data.batch_size"),
]
InputShape = Annotated[
    list[str] | None,
    option(DATA, "--input-shape", "Synthetic inputs, e.g. 3,224,224; once for each input of the model.", "SHAPE"),
    Sets("data.input_shape"),
]
Seed = Annotated[
    int | None, option(DATA, "--seed", "Seed of torch, numpy and random (default 0).", "N"), Sets("data.seed")
]
Batches = Annotated[
    int | None,
    option(RUN, "--batches", "Measure exactly N micro-batches (default: until every layer is decided).", "N"),
    Sets("data.batches"),
]
MaxBatches = Annotated[
    int | None,
    option(RUN, "--max-batches", "Upper limit on micro-batches if --batches is not given (default 256).", "N"),
    Sets("scan.max_batches"),
]
Device = Annotated[
    str | None,
    option(RUN, "--device", "cpu, cuda, cuda:1 (default: the model's own, else CUDA if available).", "NAME"),
    Sets("scan.device"),
]
Autocast = Annotated[
    Literal["bfloat16", "float16"] | None,
    option(RUN, "--autocast", "bfloat16 or float16: run under autocast.", "DTYPE"),
    Sets("scan.autocast"),
]
PhysicalBatch = Annotated[
    int | None,
    option(RUN, "--physical-batch", "Samples per forward pass (default: from memory).", "N"),
    Sets("scan.physical_batch"),
]
NoEmulate = Annotated[
    bool,
    option(RUN, "--no-emulate", "Run every micro-batch separately (slower)."),
    Sets("scan.emulate", lambda given: False),
]
Threshold = Annotated[
    float | None,
    option(JUDGE, "--threshold", "Flag layers whose equivalent batch size is below N (default 32).", "N"),
    Sets("thresholds", lambda limit: {"*": limit}),
]
Include = Annotated[
    list[str] | None,
    option(JUDGE, "--include", "Only layers whose name matches; repeatable.", "GLOB"),
    Sets("layers.include"),
]
Exclude = Annotated[
    list[str] | None,
    option(JUDGE, "--exclude", "No layer whose name matches; repeatable.", "GLOB"),
    Sets("layers.exclude"),
]
Select = Annotated[
    list[str] | None,
    option(JUDGE, "--select", "Only rules of this code or prefix, e.g. BN2; repeatable.", "CODE"),
    Sets("rules.select", codes),
]
Ignore = Annotated[
    list[str] | None,
    option(JUDGE, "--ignore", "No rule of this code or prefix; repeatable.", "CODE"),
    Sets("rules.ignore", codes),
]
Goal = Annotated[
    Literal["max", "min"] | None,
    option(RUN, "--goal", "Which metric is better: max or min (default: max, where the loss agrees).", "NAME"),
    Sets("repair.goal"),
]
Force = Annotated[
    bool,
    option(REPORT, "--force", "Replace outputs that exist; write weights even if they score worse than as loaded."),
]
ForceReport = Annotated[bool, option(REPORT, "--force", "Replace files of the report that exist.")]
ReportFormat = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        help="Format of the report.",
        rich_help_panel=REPORT,
        metavar="NAME",
        parser=format_name,
    ),
]
Output = Annotated[Path | None, option(REPORT, "--output", "Write the report to FILE, a new file.", "FILE")]
OutputDir = Annotated[
    Path | None,
    option(REPORT, "--output-dir", "Write a file for each --format to DIR, named after command and format.", "DIR"),
]
KnownFindings = Annotated[
    Path | None,
    option(REPORT, "--baseline", "Exit 1 only for findings that are not in FILE, or worse than there.", "FILE"),
]
WriteBaseline = Annotated[
    Path | None, option(REPORT, "--write-baseline", "Write the findings to FILE, to be known from now on.", "FILE")
]
Verbose = Annotated[bool, option(REPORT, "--verbose", "Print the whole report, not what fits a screen.")]
ShowAll = Annotated[bool, option(REPORT, "--all", "Show every layer of a large network.")]
ExitZero = Annotated[bool, option(REPORT, "--exit-zero", "Exit 0 even with findings.")]


def overrides(context: typer.Context) -> dict[str, Any]:
    """Values of a command's options by field of the spec; None: not given.

    Args:
        context: Context of the running command.
    """
    callback = context.command.callback
    assert callback is not None  # every command of bnprobe is a function
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(inspect.unwrap(callback), eval_str=True).parameters.items():
        for note in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(note, Sets):
                value = context.params[name]
                given = value != parameter.default and value not in ([], ())
                found[note.key] = note.convert(value) if given else None
    return found

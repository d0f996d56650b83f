"""``bnprobe scan``."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnprobe.errors import EXIT_CLEAN, EXIT_FINDINGS, BnprobeError, NothingToProbeError

if TYPE_CHECKING:
    from bnprobe.records import Report
    from bnprobe.spec import Spec

Many = list[str] | None


class Format(str, enum.Enum):
    """Names of the report formats."""

    terminal = "terminal"
    json = "json"


class Autocast(str, enum.Enum):
    """Autocast dtypes."""

    bfloat16 = "bfloat16"
    float16 = "float16"


def _option(panel: str, name: str, help_: str, metavar: str = "") -> typer.models.OptionInfo:
    """An option; flags have no metavar."""
    info: typer.models.OptionInfo = typer.Option(name, help=help_, rich_help_panel=panel, metavar=metavar)
    return info


_MODEL, _DATA, _RUN, _JUDGE, _REPORT = "Model", "Data", "Measurement", "Judgement", "Report"


def scan(
    target: Annotated[
        str,
        typer.Argument(
            help="model.py[:SYMBOL], package.module[:SYMBOL], timm:NAME, torchvision:NAME, or a spec file (.yaml).",
            metavar="TARGET",
        ),
    ],
    checkpoint: Annotated[
        str | None,
        _option(_MODEL, "--checkpoint", "Weights: safetensors, or a state dict for torch.load.", "FILE"),
    ] = None,
    unsafe_load: Annotated[
        bool, _option(_MODEL, "--unsafe-load", "Let --checkpoint run pickled code, with your rights.")
    ] = False,
    batch_size: Annotated[
        int | None,
        _option(_DATA, "--batch-size", "Images in a micro-batch; the loader is rebuilt with it.", "N"),
    ] = None,
    input_shape: Annotated[
        Many,
        _option(
            _DATA,
            "--input-shape",
            "Made-up images, e.g. 3,224,224; once for each input of the model.",
            "SHAPE",
        ),
    ] = None,
    seed: Annotated[int | None, _option(_DATA, "--seed", "Seed of torch, numpy and random (default 0).", "N")] = None,
    batches: Annotated[
        int | None,
        _option(_RUN, "--batches", "Measure exactly N micro-batches (default: until all is decided).", "N"),
    ] = None,
    max_batches: Annotated[
        int | None, _option(_RUN, "--max-batches", "At most N without --batches (default 256).", "N")
    ] = None,
    batch_sizes: Annotated[
        str | None, _option(_RUN, "--batch-sizes", "Eval path at these sizes too, e.g. 1,2,4,8.", "N,N")
    ] = None,
    device: Annotated[
        str | None,
        _option(_RUN, "--device", "cpu, cuda, cuda:1 (default: the model's own, else CUDA if any).", "NAME"),
    ] = None,
    autocast: Annotated[
        Autocast | None, _option(_RUN, "--autocast", "bfloat16 or float16: run under autocast.", "DTYPE")
    ] = None,
    physical_batch: Annotated[
        int | None,
        _option(_RUN, "--physical-batch", "Images that run at once (default: from memory).", "N"),
    ] = None,
    no_emulate: Annotated[bool, _option(_RUN, "--no-emulate", "Run real micro-batches, one by one.")] = False,
    threshold: Annotated[
        float | None,
        _option(_JUDGE, "--threshold", "Flag layers whose equivalent batch size is below N (default 32).", "N"),
    ] = None,
    include: Annotated[
        Many, _option(_JUDGE, "--include", "Only layers whose name matches; repeatable.", "GLOB")
    ] = None,
    exclude: Annotated[Many, _option(_JUDGE, "--exclude", "No layer whose name matches; repeatable.", "GLOB")] = None,
    format_: Annotated[Format, _option(_REPORT, "--format", "terminal or json.", "NAME")] = Format.terminal,
    output: Annotated[
        Path | None, _option(_REPORT, "--output", "Write the report to FILE, whole or not at all.", "FILE")
    ] = None,
    show_all: Annotated[bool, _option(_REPORT, "--all", "Show every layer of a large network.")] = False,
    exit_zero: Annotated[bool, _option(_REPORT, "--exit-zero", "Exit 0 where findings would exit 1.")] = False,
) -> None:
    """Measure every BN layer in training and at inference, and say which ones disagree.

    Exit codes: 0 clean, 1 findings, 2 error in usage, spec or your code, 3 nothing could be probed.
    """
    from bnprobe.cli.write import check_writable, write_report
    from bnprobe.specfile import build_spec

    overrides = {
        "checkpoint.path": checkpoint,
        "checkpoint.unsafe_load": unsafe_load or None,
        "data.batch_size": batch_size,
        "data.input_shape": input_shape or None,
        "data.seed": seed,
        "data.batches": batches,
        "scan.max_batches": max_batches,
        "scan.batch_sizes": batch_sizes,
        "scan.device": device,
        "scan.autocast": autocast and autocast.value,
        "scan.physical_batch": physical_batch,
        "scan.emulate": False if no_emulate else None,
        "thresholds": None if threshold is None else {"*": threshold},
        "layers.include": include or None,
        "layers.exclude": exclude or None,
    }
    check_writable(output)
    spec = build_spec(target, overrides)
    try:
        report = _measure(spec)
    except BnprobeError as error:
        if error.report is not None:
            write_report(error.report, format_.value, output, show_all)
        raise
    write_report(report, format_.value, output, show_all)
    findings = report.summary.flagged > 0 and not exit_zero
    raise typer.Exit(EXIT_FINDINGS if findings else EXIT_CLEAN)


def _measure(spec: Spec) -> Report:
    """Scan, and show progress.

    Raises:
        NothingToProbeError: Ctrl-C before anything was measured; later ones pass.
    """
    from bnprobe.cli.progress import progress_bar

    measured = 0
    _share_processors()
    try:
        with progress_bar() as show:
            from bnprobe.pipeline import scan_spec  # seconds of torch: only once the options are known to be right

            def progress(done: int, planned: int) -> None:
                nonlocal measured
                measured = done
                show(done, planned)

            return scan_spec(spec, progress)
    except KeyboardInterrupt:
        if measured:
            raise
        raise NothingToProbeError("Interrupted before anything was measured; there is no report.") from None


def _share_processors() -> None:
    """Let idle threads of OpenMP sleep soon, unless the user says otherwise; to be called before torch is imported.

    By default they spin for milliseconds after every kernel. Where another process (a loader's worker, a neighbour
    in CI) wants the same cores, a scan of a small network was 10 to 25 times slower for that; alone it is as fast.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

"""``bnprobe export``: write a model in another format, and check that the file gives the model's outputs."""

from __future__ import annotations

import io
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.commands.exporters import (
    Arguments,
    Exporter,
    RunExported,
    Written,
    arguments_of,
    exporter_of,
    is_installed,
    quantized,
    root_cause,
    shapes_of,
)
from bnprobe.config.exporters import EXPORTERS, ExportFormat
from bnprobe.config.spec import Spec
from bnprobe.errors import RepairError, UsageError, UserCodeError, message_of
from bnprobe.files import require_new, write_all
from bnprobe.loading.arguments import require_model
from bnprobe.loading.data import as_batch_source
from bnprobe.loading.model import unwrapped
from bnprobe.loading.samples import count_samples
from bnprobe.loading.workload import Workload, load_workload
from bnprobe.measure.batch import CannotEmulateError, check_finite, join, pick, tensors_of
from bnprobe.measure.reader import lasting
from bnprobe.measure.restore import preserved_generators, preserved_random_state, seed_everything
from bnprobe.measure.session import default_forward, forward_all
from bnprobe.records import Difference, ExportReport
from bnprobe.wording import from_python, option

BATCHES = 3
"""Batches of the user's data to check the file on, in addition to one of another size and one of a single sample."""

TOLERANCE = 1e-5
"""Largest accepted difference of the outputs, relative to the largest output."""

_SYNTHETIC_BATCH = 4


@dataclass(frozen=True)
class Exported:
    """An exported file that is not written yet, and the results of its check.

    Attributes:
        format: Name of the format, as for ``--to``.
        model, checkpoint: As in the record of a scan.
        content: Content of the file.
        differences: Differences between the outputs of the file and of the exported model, per batch; empty: the file
            could not be run.
        quantization: Differences between the outputs of the quantized model and of the model as loaded; empty: not
            quantized.
        notes: What the reader should know, one sentence each.
    """

    format: str
    model: str
    checkpoint: str | None
    content: bytes
    differences: tuple[Difference, ...]
    quantization: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def relative(self) -> float:
        """The largest relative difference; 0 if the file could not be run."""
        return max((each.relative for each in self.differences), default=0.0)

    def report(self, output: str | None, tolerance: float) -> ExportReport:
        """What was exported and compared.

        Args:
            output: The file that was written; None: none was.
            tolerance: The largest relative difference that was accepted.
        """
        compared = self.differences, self.quantization
        return ExportReport(self.format, self.model, self.checkpoint, output, tolerance, *compared, self.notes)


@from_python
def export(
    model: nn.Module,
    batches: Any,
    path: str | PathLike[str],
    batch_size: int | None = None,
    *,
    to: str | None = None,
    quantize: bool = False,
    tolerance: float = TOLERANCE,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    batch_size_of: Callable[[Any], int] | None = None,
    seed: int = 0,
    force: bool = False,
) -> ExportReport:
    """Export ``model`` for inference, and check that the file gives its outputs, at other batch sizes too.

    A copy is exported, in eval mode from the CPU: the model comes back as it was.

    Args:
        model: Any module, on any device.
        batches: As for ``bnprobe.scan``: the examples to trace with, and to check the file on.
        path: The file. It is written only if the outputs agree.
        batch_size: Samples per batch; a DataLoader is rebuilt with it. None: the loader's own.
        to: The format, e.g. "onnx"; None: by the ending of ``path``.
        quantize: Quantize to 8 bits with torch.ao, calibrated on the batches.
        tolerance: Largest accepted difference of the outputs, relative to the largest output.
        forward: ``f(model, batch)``, as in a model file.
        batch_size_of: ``f(batch)`` that gives the number of samples, where neither loader nor batch shows it.
        seed: Seed of torch, numpy and random.
        force: Replace a file that exists.

    Returns:
        What was compared; ``ok`` says whether the file was written.

    Raises:
        RepairError: The model cannot be exported, or the file cannot be run.
        BnprobeError: See ``bnprobe.errors`` for the tree.

    Example:
        >>> # model and loader are made as in help(bnprobe)
        >>> report = bnprobe.export(model, loader, "model.pt2")
        >>> report.ok
        True
    """
    require_model(model)
    target = Path(path)
    format_ = format_named(to or _format_of(target), quantize)
    require_new([target], force, "path")
    with preserved_random_state(), preserved_generators(batches), torch.no_grad():
        seed_everything(seed)
        source = as_batch_source(batches, batch_size, batch_size_of=batch_size_of)
        inner, note = unwrapped(model)
        notes = (note,) if note else ()
        copied = Workload(
            deepcopy(inner), type(inner).__name__, None, source, None, forward, None, None, (*notes, *source.notes)
        )
        made = _exported(copied, format_, quantize)
    if agrees := made.relative <= tolerance:
        write_all({target: made.content}, force)
    return made.report(str(target) if agrees else None, tolerance)


def _format_of(path: Path) -> str:
    """The format whose files end as this one.

    Raises:
        UsageError: There is none.
    """
    found = next((each.name for each in EXPORTERS if each.suffix == path.suffix), None)
    if found is None:
        endings = ", ".join(f"{each.suffix} ({each.name})" for each in EXPORTERS)
        raise UsageError(f"What {path} is to hold its ending does not say: give to=..., or one of {endings}.")
    return found


def export_spec(spec: Spec, to: str, quantize: bool = False) -> Exported:
    """Load what a spec names, export it in eval mode from the CPU, and check the file.

    Raises:
        RepairError: The model cannot be exported, or the file cannot be run.
        BnprobeError: See ``bnprobe.errors`` for the tree.
    """
    format_ = format_named(to, quantize)
    with preserved_random_state(), torch.no_grad():
        seed_everything(spec.data.seed)
        return _exported(load_workload(_with_batch_size(spec)), format_, quantize)


def _exported(workload: Workload, format_: ExportFormat, quantize: bool) -> Exported:
    """Export the workload's own model, which is moved and put into eval mode, and check the file."""
    model = workload.model.cpu().eval()
    cases, fixed = _cases(workload, model)
    before = [(images, model(*arguments)) for images, arguments in cases]
    changes: tuple[Difference, ...] = ()
    if quantize:
        model = quantized(model, [arguments for _, arguments in cases])
        changes = tuple(
            difference(output, model(*arguments), images)
            for (images, output), (_, arguments) in zip(before, cases, strict=True)
        )
    written, run, fixed = _export(format_, model, cases, fixed)
    found = tuple(_checked(format_.name, model, run, cases, fixed)) if run else ()
    notes = [*workload.notes, *written.notes]
    if run is None:
        notes.append(
            f"The outputs were not checked, because {format_.runtime}, which runs {format_.name} files, is not"
            " installed."
        )
    named, weights = workload.model_name, workload.checkpoint
    return Exported(format_.name, named, weights, written.content, found, changes, tuple(notes))


def format_named(name: str, quantize: bool) -> ExportFormat:
    """Look up an export format.

    Raises:
        UsageError: The format is unknown, its packages are missing, or it cannot store a quantized model.
    """
    found = EXPORTERS[name]
    missing = [package for package in found.packages if not is_installed(package)]
    if missing:
        raise UsageError(f"{option('--to', name)} needs {' and '.join(missing)}. Run: pip install {' '.join(missing)}.")
    if quantize and not found.takes_quantized:
        able = next(each.name for each in EXPORTERS if each.takes_quantized)
        raise UsageError(
            f"{option('--quantize')} uses kernels that {name} cannot store; give {option('--to', able)}, or"
            " leave it out."
        )
    return found


def _with_batch_size(spec: Spec) -> Spec:
    """Synthetic inputs need a batch size; any size works."""
    if spec.data.batch_size is not None or not spec.data.input_shape:
        return spec
    return spec.model_copy(update={"data": spec.data.model_copy(update={"batch_size": _SYNTHETIC_BATCH})})


def _cases(workload: Workload, model: nn.Module) -> tuple[list[tuple[int, Arguments]], bool]:
    """Sizes and arguments of several batches, and whether the model accepts only one batch size.

    The first batch is the example for tracing; it has at least two samples if possible.
    """
    forward = workload.forward or (forward_all if workload.source.synthetic else default_forward)
    batches = list(itertools.islice(lasting(workload.source.batches), BATCHES))
    for number, batch in enumerate(batches, 1):
        check_finite(batch, number)
    if not batches:
        raise RepairError("The data yielded no batch, but an export needs one as an example input.")
    found: list[tuple[int, Arguments]] = []
    fixed = False
    for batch in [*batches, *_other_sizes(batches)]:
        images = count_samples(batch) or 1
        try:
            found.append((images, arguments_of(model, forward, batch)))
        except UserCodeError:
            if not found or images == found[0][0]:
                raise
            fixed = True  # the model accepts only the size that its loader gives
    if fixed:
        return [case for case in found if case[0] == found[0][0]], True
    found.sort(key=lambda case: case[0] < 2)  # an example of one sample would fix the size
    return found, False


def _other_sizes(batches: Sequence[Any]) -> Iterator[Any]:
    """Two batches joined, and a single sample, if batches can be joined and split."""
    images = count_samples(batches[0])
    try:
        if len(batches) > 1:
            yield join(list(batches[:2]))
    except CannotEmulateError:
        return
    if images is not None and images > 1:
        yield pick(batches[0], [0], images)


def _export(
    format_: ExportFormat, model: nn.Module, cases: Sequence[tuple[int, Arguments]], fixed: bool
) -> tuple[Written, RunExported | None, bool]:
    """The file, a function that runs it, and whether it accepts only the batch size of the example."""
    images, example = cases[0]
    exporter = exporter_of(format_)
    runs = not format_.runtime or is_installed(format_.runtime)
    if not fixed:
        # A graph can fix the size in many ways, with as many errors of torch; all mean that it accepts only one size.
        with suppress(Exception):
            return *_flexible(exporter, runs, model, cases), False
    written = _fixed(exporter, format_.name, model, example)
    note = f"The file accepts only batches of {images} samples, because the model fixes its batch size."
    return (
        replace(written, notes=(*written.notes, note)),
        _read(exporter, format_.name, written) if runs else None,
        True,
    )


def _read(exporter: Exporter, to: str, written: Written) -> RunExported:
    try:
        return exporter.read(written.content)
    except RuntimeError as error:
        raise RepairError(f"The {to} file that was made cannot be read: {error}") from error


def _flexible(
    exporter: Exporter, runs: bool, model: nn.Module, cases: Sequence[tuple[int, Arguments]]
) -> tuple[Written, RunExported | None]:
    """A file that accepts batches of any size, tested on the given ones."""
    images, example = cases[0]
    written = _written(exporter, model, example, shapes_of(example, images))
    run = exporter.read(written.content) if runs else None
    if run is not None:
        for _, arguments in cases:
            run(arguments)
    return written, run


def _fixed(exporter: Exporter, to: str, model: nn.Module, example: Arguments) -> Written:
    try:
        return _written(exporter, model, example, None)
    except Exception as error:
        raise RepairError(
            f"{type(model).__name__} could not be exported as {to} ({root_cause(error)}). Another format may"
            f" do ({option('--to')})."
        ) from error


def _written(exporter: Exporter, model: nn.Module, example: Arguments, shapes: Arguments | None) -> Written:
    with warnings.catch_warnings(), _unlogged():
        warnings.filterwarnings("ignore", category=FutureWarning)  # warnings of torch about its own internals
        return exporter.write(model, example, shapes)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Silence torch's long log about a failed graph; the error says enough."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _checked(
    to: str, model: nn.Module, run: RunExported, cases: Sequence[tuple[int, Arguments]], fixed: bool
) -> Iterator[Difference]:
    """Compare the file with the model on every batch that it accepts."""
    for images, arguments in cases:
        if fixed and images != cases[0][0]:
            continue
        try:
            found = run(arguments)
        except RuntimeError as error:
            raise RepairError(f"The {to} file cannot be run on {images} samples: {message_of(error)}") from error
        yield difference(model(*arguments), found, images)


def difference(expected: Any, found: Any, images: int) -> Difference:
    """Compare outputs tensor by tensor, in any nested structure."""
    one, other = tensors_of(expected), tensors_of(found)
    if not one or len(one) != len(other):
        return Difference(images, math.inf, math.inf)
    parts = [_apart(left, right) for left, right in zip(one, other, strict=True)]
    return Difference(images, max(part[0] for part in parts), max(part[1] for part in parts))


def _apart(expected: Tensor, found: Tensor) -> tuple[float, float]:
    if expected.shape != found.shape:
        return math.inf, math.inf
    if expected.numel() == 0:
        return 0.0, 0.0
    one, other = expected.detach().double(), found.detach().double()
    same = (one == other) | (one.isnan() & other.isnan())  # equal infinities are no difference
    gap = torch.where(same, 0.0, (one - other).abs())
    if not bool(torch.isfinite(gap).all()):
        return math.inf, math.inf
    absolute = float(gap.max())
    largest = float(one.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max())
    return absolute, absolute / largest if largest else (math.inf if absolute else 0.0)

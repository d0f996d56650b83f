"""How files of each export format are written and read, one class each, and the quantization to 8 bits."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.jit._trace import TracerWarning

from bnprobe.config.exporters import ExportFormat
from bnprobe.errors import RepairError, UsageError, is_library_file, message_of
from bnprobe.loading.model import BatchFunction
from bnprobe.measure.batch import copy_tensors, map_leaves, tensors_of
from bnprobe.measure.session import describe_call, model_code
from bnprobe.registry import load_code
from bnprobe.wording import option

Arguments = tuple[Any, ...]
"""Positional arguments of the model's ``forward``: tensors, or nested structures of them."""

RunExported = Callable[[Arguments], Any]
"""Runs a file on such arguments and returns its outputs."""


@dataclass(frozen=True)
class Written:
    """The content of a file, and notes for the reader, one sentence each."""

    content: bytes
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """Writes and reads the files of one export format."""

    def write(self, model: nn.Module, arguments: Arguments, shapes: Arguments | None) -> Written:
        """Return the content of the file for a model in eval mode on the CPU.

        It is made in memory, because torch's own writer kills the process if the disk is full.

        Args:
            model: The model.
            arguments: Example arguments, for a batch of at least two samples.
            shapes: Same structure as the arguments, with ``{0: Dim}`` for tensors whose first axis is the batch axis,
                else None. None for the whole: the file need only accept the batch size of the example.

        Raises:
            Exception: Anything that torch raises if the model cannot be exported.
        """

    def read(self, content: bytes) -> RunExported:
        """Load the file as a program would."""


def exporter_of(format_: ExportFormat) -> Exporter:
    """Import the exporter of a format.

    Raises:
        UsageError: It cannot be imported.
    """
    exporter: Exporter = load_code(format_.exporter, f'The exporter of the export format "{format_.name}"', UsageError)
    return exporter


def root_cause(error: BaseException) -> str:
    """The root cause in one line; torch wraps such errors in pages of advice for developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in message_of(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def arguments_of(model: nn.Module, forward: BatchFunction, batch: Any) -> Arguments:
    """Run the user's forward on a batch, and return the positional arguments of the first call of the model itself.

    Raises:
        RepairError: The model itself is not called, gets no tensor, or gets keyword-only arguments.
        UserCodeError: The user's code raised.
    """
    calls: list[Arguments] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(copy_tensors(_positional(module, args, kwargs)))

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), model_code(f"calling {describe_call(forward, batch)} (before the export)"):
            forward(model, copy_tensors(batch))
    finally:
        handle.remove()
    if not calls:
        raise RepairError(
            "forward(model, batch) calls only parts of the model, never the model itself, so there is no complete graph"
            " to export. Move what is to be deployed into the model's own forward()."
        )
    if not tensors_of(calls[0]):
        raise RepairError("The model is called without a tensor, so an exported file would have no input.")
    return calls[0]


def _positional(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    if not kwargs:
        return args
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    if bound.kwargs:
        raise RepairError(
            f"The model is called with keyword-only arguments ({', '.join(bound.kwargs)}), but exported files accept"
            " only positional ones: remove the * or ** from its forward()."
        )
    return bound.args


def shapes_of(arguments: Arguments, images: int) -> Arguments:
    """The batch axes of the arguments, in the form that ``torch.export`` takes for dynamic shapes."""
    batch = Dim("batch")

    def shape(leaf: Any) -> Any:
        counts = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == images
        return {0: batch} if counts else None

    found: Arguments = map_leaves(arguments, shape)
    return found


class OnnxExporter:
    """``torch.onnx.export`` based on torch.export; checked with ONNX Runtime."""

    def write(self, model: nn.Module, arguments: Arguments, shapes: Arguments | None) -> Written:
        if arguments and isinstance(arguments[-1], Mapping):
            arguments = (*arguments, {})  # a mapping in the last place would be taken for keyword arguments
        # The exporter tells of its progress and internals.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model, arguments, dynamo=True, dynamic_shapes=shapes, verbose=False)
            assert program is not None  # always so with dynamo=True
            return Written(program.model_proto.SerializeToString())  # one file, including the weights

    def read(self, content: bytes) -> RunExported:
        import onnxruntime

        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def run(arguments: Arguments) -> Any:
            tensors = tensors_of(arguments)
            if len(tensors) != len(names):
                raise RepairError(
                    f"The ONNX file has {len(names)} inputs ({', '.join(names)}), but the model takes {len(tensors)}:"
                    " it does not use all of them. Remove the unused ones from its forward()."
                )
            feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
            return tuple(torch.as_tensor(value) for value in session.run(None, feed))

        return run


_MODULE = "torch.ao.quantization.quantize_fx"


def quantized(model: nn.Module, batches: Sequence[Arguments]) -> nn.Module:
    """A copy with 8-bit weights and activations wherever torch has kernels for them on this machine.

    BN layers are folded into the preceding convolutions, with their running statistics.

    Args:
        model: The model, in eval mode on the CPU.
        batches: Batches to calibrate the ranges of activations on.

    Raises:
        RepairError: This version of torch has no torch.ao quantization, or it does not support the model.
    """
    if importlib.util.find_spec("torch.ao.quantization") is None or importlib.util.find_spec(_MODULE) is None:
        raise RepairError(
            f"{option('--quantize')} needs {_MODULE}, which this torch ({torch.__version__}) does not have."
            " Leave it out, or use"
            " an earlier torch."
        )
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch.ao moving to another package, and about its observers
            return _converted(copy.deepcopy(model), batches)
    except Exception as error:
        raise RepairError(
            f"The model could not be quantized by torch.ao ({root_cause(error)}). Export it without"
            f" {option('--quantize')}."
        ) from error


def _converted(model: nn.Module, batches: Sequence[Arguments]) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping = get_default_qconfig_mapping(torch.backends.quantized.engine)
    prepared = prepare_fx(model, mapping, batches[0])
    for arguments in batches:
        prepared(*arguments)
    converted: nn.Module = convert_fx(prepared)
    return converted


class TorchExporter:
    """``torch.export.export`` and ``torch.export.save``."""

    def write(self, model: nn.Module, arguments: Arguments, shapes: Arguments | None) -> Written:
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(model, arguments, dynamic_shapes=shapes), buffer)
        return Written(buffer.getvalue())

    def read(self, content: bytes) -> RunExported:
        return _with_positions(torch.export.load(io.BytesIO(content)).module())


class TorchScriptExporter:
    """``torch.jit.trace``, or ``torch.jit.script`` if a trace would freeze a branch that depends on the data."""

    def write(self, model: nn.Module, arguments: Arguments, shapes: Arguments | None) -> Written:
        buffer = io.BytesIO()
        with _undeprecated():
            program, notes = _traced(model, arguments)
            torch.jit.save(program, buffer)
        return Written(buffer.getvalue(), notes)

    def read(self, content: bytes) -> RunExported:
        with _undeprecated():
            return _with_positions(torch.jit.load(io.BytesIO(content)))


def _with_positions(module: nn.Module) -> RunExported:
    def run(arguments: Arguments) -> Any:
        return module(*arguments)

    return run


def _traced(model: nn.Module, arguments: Arguments) -> tuple[Any, tuple[str, ...]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TracerWarning)
        program = torch.jit.trace(model, arguments, check_trace=False, strict=False)
    frozen = [
        warning
        for warning in caught
        if issubclass(warning.category, TracerWarning) and not is_library_file(warning.filename)
    ]
    if not frozen:
        return program, ()
    try:
        return torch.jit.script(model), ()
    except Exception:  # anything in the user's Python that TorchScript does not support; the trace is checked too
        first = str(frozen[0].message).split(". ")[0].split("! ")[0]
        return program, (f"The trace may have frozen a branch that depends on the data; scripting failed: {first}.",)


@contextmanager
def _undeprecated() -> Iterator[None]:
    """Silence the warning that TorchScript is deprecated, since the user asked for it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield

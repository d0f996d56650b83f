"""TorchScript: PyTorch's format before torch.export, still used in C++ and on mobile devices."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.jit._trace import TracerWarning

from bnprobe.errors import is_library_file
from bnprobe.exporting.interface import Arguments, Run, Written


class TorchScriptExporter:
    """``torch.jit.trace``, or ``torch.jit.script`` if a trace would freeze a branch that depends on the data."""

    name = "torchscript"
    suffix = ".pt"
    packages: tuple[str, ...] = ()
    takes_quantized = True

    def write(self, model: nn.Module, arguments: Arguments, shapes: Arguments | None) -> Written:
        buffer = io.BytesIO()
        with _undeprecated():
            program, notes = _traced(model, arguments)
            torch.jit.save(program, buffer)
        return Written(buffer.getvalue(), notes)

    def read(self, content: bytes) -> Run:
        with _undeprecated():
            module = torch.jit.load(io.BytesIO(content))

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

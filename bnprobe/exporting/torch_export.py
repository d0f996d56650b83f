"""torch.export: the graph format of PyTorch 2, as a .pt2 file."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn

from bnprobe.exporting.interface import Arguments, Run, Written


class TorchExporter:
    """``torch.export.export`` and ``torch.export.save``."""

    name = "torch-export"
    suffix = ".pt2"
    packages: tuple[str, ...] = ()
    takes_quantized = False

    def write(self, model: nn.Module, arguments: Arguments, shapes: Arguments | None) -> Written:
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(model, arguments, dynamic_shapes=shapes), buffer)
        return Written(buffer.getvalue())

    def read(self, content: bytes) -> Run:
        module = torch.export.load(io.BytesIO(content)).module()

        def run(arguments: Arguments) -> Any:
            return module(*arguments)

        return run

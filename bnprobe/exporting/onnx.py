"""ONNX, for runtimes other than PyTorch."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.errors import RepairError
from bnprobe.exporting.interface import Arguments, Run, Written, is_installed
from bnprobe.probing.batch import tensors_of


class OnnxExporter:
    """``torch.onnx.export`` based on torch.export; checked with ONNX Runtime."""

    name = "onnx"
    suffix = ".onnx"
    packages = ("onnx", "onnxscript")
    takes_quantized = False

    def write(self, model: nn.Module, arguments: Arguments, shapes: Arguments | None) -> Written:
        with _quietly():
            program = torch.onnx.export(
                model, _unambiguous(arguments), dynamo=True, dynamic_shapes=shapes, verbose=False
            )
            assert program is not None  # always so with dynamo=True
            return Written(program.model_proto.SerializeToString())  # one file, including the weights

    def read(self, content: bytes) -> Run | None:
        if not is_installed("onnxruntime"):
            return None
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
            return tuple(_as_tensor(value) for value in session.run(None, feed))

        return run


def _unambiguous(arguments: Arguments) -> Arguments:
    """Add an empty mapping after a mapping in the last place, which would be taken for keyword arguments."""
    return (*arguments, {}) if arguments and isinstance(arguments[-1], Mapping) else arguments


def _as_tensor(value: Any) -> Tensor:
    return torch.as_tensor(value)


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the exporter's messages about its progress and internals."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield

"""The interface of export formats."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

Arguments = tuple[Any, ...]
"""Positional arguments of the model's ``forward``: tensors, or nested structures of them."""

Run = Callable[[Arguments], Any]
"""Runs a file on such arguments and returns its outputs."""


@dataclass(frozen=True)
class Written:
    """The content of a file, and notes for the reader, one sentence each."""

    content: bytes
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """One export format."""

    @property
    def name(self) -> str:
        """Name of the format, as for ``--to``."""

    @property
    def suffix(self) -> str:
        """Suffix of file names, with the dot."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that must be installed in addition to torch."""

    @property
    def takes_quantized(self) -> bool:
        """Whether a model quantized by torch.ao can be written."""

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

    def read(self, content: bytes) -> Run | None:
        """Load the file as a program would; None if no package that can run it is installed."""


def root_cause(error: BaseException) -> str:
    """The root cause in one line; torch wraps such errors in pages of advice for developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None

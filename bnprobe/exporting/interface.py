"""The seam of the export formats."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

Arguments = tuple[Any, ...]
"""Positional arguments of the model's ``forward``: tensors, or nests of them."""

Run = Callable[[Arguments], Any]
"""What a file does with such arguments: the outputs."""


@dataclass(frozen=True)
class Written:
    """The content of a file, and what the reader should know, a sentence each."""

    content: bytes
    notes: tuple[str, ...] = ()


class Exporter(Protocol):
    """One format."""

    @property
    def name(self) -> str:
        """As ``--to`` has it."""

    @property
    def suffix(self) -> str:
        """Of file names, with the dot."""

    @property
    def packages(self) -> tuple[str, ...]:
        """What must be installed beside torch."""

    @property
    def takes_quantized(self) -> bool:
        """Whether a model quantized by torch.ao can be written."""

    def write(self, model: nn.Module, arguments: Arguments, shapes: Arguments | None) -> Written:
        """The content of the file for a model in eval mode and on the CPU.

        It is made in memory: torch's own writer ends the process where a disk is full.

        Args:
            model: The model.
            arguments: An example of at least two images.
            shapes: Like the arguments, with ``{0: Dim}`` where a tensor's first axis counts the images, else None;
                None: the file need take batches of the example's size only.

        Raises:
            Exception: Whatever torch raises where the model cannot be exported.
        """

    def read(self, content: bytes) -> Run | None:
        """Load the file as a program would; None where what runs it is not installed."""


def root_cause(error: BaseException) -> str:
    """What began it, in a line: torch wraps such errors in pages of advice to its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None

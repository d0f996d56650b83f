"""What PyTorch is asked to compute, counted: it does not depend on the machine, as seconds do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAIT = torch.ops.aten._local_scalar_dense.default
"""The host reads a number: on a GPU it waits there."""


@contextmanager
def reads() -> Iterator[list[int]]:
    """The sizes of the tensors that the host reads as lists inside, which is not dispatched."""
    found: list[int] = []
    tolist = torch.Tensor.tolist

    def noted(tensor: torch.Tensor) -> Any:
        found.append(tensor.numel())
        return tolist(tensor)

    with mock.patch.object(torch.Tensor, "tolist", noted):
        yield found


class Operators(TorchDispatchMode):
    """Counts the operators that run inside.

    Attributes:
        found: How often each ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func] += 1
        return func(*args, **(kwargs or {}))

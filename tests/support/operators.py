"""What PyTorch is asked to compute, counted: it does not depend on the machine, as seconds do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAIT = torch.ops.aten._local_scalar_dense.default
"""The host reads a number: on a GPU it waits there."""


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

"""What a training step keeps for the backward pass: the input, as in BN, and no copy of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bnprobe.nn import (
    BatchRenorm2d,
    DomainBatchNorm2d,
    ExampleWeighedBatchNorm2d,
    FrozenBatchNorm2d,
    GatedBatchNorm2d,
    GhostBatchNorm2d,
    InstanceRenorm2d,
    MovingAverageBatchNorm2d,
)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "bn": lambda: nn.BatchNorm2d(3),
    "renorm": lambda: BatchRenorm2d(3),
    "domain": lambda: DomainBatchNorm2d(3, default_domain=0),
    "weighed": lambda: ExampleWeighedBatchNorm2d(3),
    "frozen": lambda: FrozenBatchNorm2d(3),
    "gated": lambda: GatedBatchNorm2d(3),
    "ghost": lambda: GhostBatchNorm2d(3, virtual_batch_size=4),
    "instance": lambda: InstanceRenorm2d(3),
    "average": lambda: MovingAverageBatchNorm2d(3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_the_backward_pass_keeps_the_input_and_no_copy_of_it(name: str, dtype: torch.dtype) -> None:
    x = 1.0 * torch.randn(8, 3, 16, 16, dtype=dtype, requires_grad=True)
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = LAYERS[name]()(x)
    copies = 1 if name == "gated" and dtype != torch.float32 else 0  # in float32, to differentiate its statistics
    assert sum(kept.values()) < (1.1 + copies) * x.numel() * x.element_size()
    y.sum().backward()

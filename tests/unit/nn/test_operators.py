"""What a training step of Batch Renorm runs, beside one of BN: on small batches the number of operators is its cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from bnprobe.nn import BatchRenorm2d, kernels
from support.operators import Operators

aten = torch.ops.aten
SMALL, LARGE = (2, 16, 3, 3), (4, 32, 40, 40)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero")
"""Operators that wait for the device."""


def _names(operators: Operators) -> list[str]:
    """Of those that ran, views aside."""
    return [each.overloadpacket.__name__ for each in operators.found.elements() if not each.is_view]


def _run(layer: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[str]]:
    """The operators of forward and backward."""
    monkeypatch.setattr(kernels, "is_looked_into", lambda x: False)  # which a dispatch mode is taken for
    leaves = [x.requires_grad_(), *layer.parameters()]
    with Operators() as forward:
        y = layer(x)
    gradient = torch.ones_like(y)
    with Operators() as backward:
        torch.autograd.grad(y, leaves, gradient)
    return _names(forward), _names(backward)


@pytest.mark.parametrize(
    ("shape", "layout", "more"),
    [
        (SMALL, "contiguous", 15),
        (SMALL, "channels_last", 15),
        (LARGE, "channels_last", 16),  # addcmul in place of BN's own kernel
        (LARGE, "contiguous", 30),  # moments by mean and vector_norm
    ],
)
def test_forward_and_backward_beside_bn(
    shape: tuple[int, ...], layout: str, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape).to(memory_format=FORMATS[layout])
    plain = _run(nn.BatchNorm2d(shape[1]), x, monkeypatch)
    ours = _run(BatchRenorm2d(shape[1]), x, monkeypatch)
    assert len(ours[0]) <= len(plain[0]) + more
    assert len(ours[1]) <= len(plain[1]) + 2
    assert ours[1].count("native_batch_norm_backward") == 1
    checks = shape == LARGE and layout == "contiguous"  # whether the fast moments were exact, on CPU alone
    assert sum(name in WAITS for name in ours[0] + ours[1]) == checks


def _graphs(layer: nn.Module, x: Tensor) -> list[Counter[str]]:
    """The operators of forward and backward that a compiler is given."""
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[Counter[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(Counter(node.target.overloadpacket.__name__ for node in _of_size(graph, x.numel())))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True, backend=backend)(x)
    torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    return graphs


def _of_size(graph: torch.fx.GraphModule, values: int) -> list[torch.fx.Node]:
    """The operators that read something as large as the input."""
    return [
        node
        for node in graph.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and any(
            isinstance(each.meta.get("val"), Tensor) and each.meta["val"].numel() == values
            for each in node.all_input_nodes
        )
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch's own, when inductor is imported
def test_compiled_it_reads_the_batch_as_bn_does() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    ours, plain = _graphs(BatchRenorm2d(3), x), _graphs(nn.BatchNorm2d(3), x)
    assert len(ours) == len(plain) == 2
    assert ours == plain

"""What swapping a layer's statistics changes at the outputs, to first order: a few backward passes for all layers.

The swap turns a layer's output A * z + B, z normalized by the running statistics, into A' * z + B' with A' = A / r and
B' = B - A * d / r per micro-batch, since z_train = (z_test - d) / r. So far this is exact. What it does to the outputs
y is linearized, dy = dy/dA (A' - A) + dy/dB (B' - B), and |dy|^2 is the mean of (u . dy)^2 over random vectors u with
E[u u'] = I (after Hutchinson 1990), for which u . dy takes one backward pass that serves all layers. Images are
independent on the eval path, so that each gives a product of its own; where they are not, each micro-batch does. The
vectors of an image are orthogonal: as many as it has outputs leave no error of theirs at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor

from bnprobe.errors import DeviceError, UserCodeError
from bnprobe.probing.batches import CannotEmulateError
from bnprobe.probing.intercept import Recorded, Slot
from bnprobe.probing.sample import Sample, floating, relative, square_norm, to_host, total
from bnprobe.probing.swap import Leaves

_SAMPLES = 256
"""Products u . dy behind an estimate: of equal |dy| they leave it a standard error below 1 / sqrt(2 * 256), 4%."""

_MOST_DRAWS = 16
"""Backward passes over the same images at most."""

_ORTHOGONAL = 2**14
"""Outputs of an image up to which its vectors are made orthogonal; beyond, random ones are so almost by themselves."""

_Pair = tuple[Tensor, Tensor]
"""Of scale and shift, each of shape (units, channels)."""


def estimate_changes(sample: Sample, layers: AbstractSet[int], coupled: bool) -> dict[int, float]:
    """Estimated relative L2 change of the outputs for each layer by itself.

    Args:
        sample: Of one micro-batch at a time where ``coupled``.
        layers: Indices.
        coupled: Other layers normalize with batch statistics on the eval path, so that images reach each other.

    Returns:
        Without the layers that no gradient reaches, in all of their calls; empty if the model cannot be differentiated.
    """
    per_image = sample.emulation.trusted and not coupled
    units = len(sample.micro_batches) * (sample.batch_size if per_image else 1)
    draws = min(_MOST_DRAWS, -(-_SAMPLES // max(units, 1)))
    generator = torch.Generator(sample.runner.device).manual_seed(0)

    def run(joined: Any, chunk: list[Any]) -> tuple[Tensor, dict[int, Tensor]]:
        return _backward(sample, joined, len(chunk), layers, per_image, draws, generator)

    try:
        parts = sample.in_chunks(run)
    except (UserCodeError, DeviceError, CannotEmulateError, RuntimeError):
        # It ran without a graph before: what fails is differentiating it (numpy, no derivative, no memory).
        return {}
    reached = [index for index in layers if all(index in squares for _, squares in parts)]
    sums = [total(squares[index] for _, squares in parts) for index in reached]
    norm, *host = to_host([total(norm for norm, _ in parts), *sums])
    found = {index: relative(square, norm) for index, square in zip(reached, host, strict=True)}
    return {index: value for index, value in found.items() if value is not None}


def _backward(
    sample: Sample,
    joined: Any,
    micro_batches: int,
    layers: AbstractSet[int],
    per_image: bool,
    draws: int,
    generator: torch.Generator,
) -> tuple[Tensor, dict[int, Tensor]]:
    """|y|^2, and for each layer that gradients reach the mean of (u . dy)^2, summed over units."""
    leaves: dict[Slot, Leaves] = {}
    with torch.enable_grad():
        output, _, pass_ = sample.forward(joined, micro_batches, per_image=per_image, leaves=leaves)
    outputs = floating(output)
    slots = [slot for slot in leaves if slot[0] in layers]
    changes = [_change(sample, slot, leaves[slot], pass_.records[slot]) for slot in slots]
    apart = all(tensor.dim() > 0 and tensor.shape[0] % pass_.images == 0 for tensor in outputs)
    differentiable = [tensor for tensor in outputs if tensor.requires_grad and tensor.numel()]
    streams = [_directions(tensor, draws, generator) for tensor in differentiable]
    squares: dict[int, list[Tensor]] = {}
    for draw in range(draws):
        vectors = [next(stream) for stream in streams]
        gradients = _gradients(differentiable, vectors, [leaves[slot] for slot in slots], keep=draw + 1 < draws)
        for index, product in _products(slots, changes, gradients).items():
            squares.setdefault(index, []).append((product if apart else product.sum()).square().sum())
    return square_norm(outputs), {index: total(values) / draws for index, values in squares.items()}


def _gradients(
    outputs: list[Tensor], vectors: list[Tensor], leaves: list[Leaves], keep: bool
) -> Sequence[_Pair | None]:
    """Gradient of u . y with respect to scale and shift of each call; None where there is none."""
    if not outputs or not leaves:
        return [None] * len(leaves)
    inputs = [tensor for leaf in leaves for tensor in (leaf.scale, leaf.shift)]
    found = torch.autograd.grad(outputs, inputs, vectors, retain_graph=keep, allow_unused=True)
    pairs = zip(found[::2], found[1::2], strict=True)
    return [None if one is None or other is None else (one, other) for one, other in pairs]


def _directions(tensor: Tensor, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random vectors for an output, without end; those of one row are orthogonal to each other as far as they can."""
    rows = tensor.shape[0] if tensor.dim() else 1
    size = tensor.numel() // rows
    columns = min(draws, size) if size <= _ORTHOGONAL else 1
    wide = torch.promote_types(tensor.dtype, torch.float32)
    while True:
        block = torch.randn(rows, size, columns, generator=generator, device=tensor.device, dtype=wide)
        if size <= _ORTHOGONAL:
            basis, triangle = torch.linalg.qr(block)
            # Without the signs it would not be random: one output per image would always have the same one.
            block = basis * triangle.diagonal(dim1=1, dim2=2).sign().unsqueeze(1) * size**0.5
        for column in block.unbind(2):
            yield column.reshape(tensor.shape).to(tensor.dtype)


def _products(slots: list[Slot], changes: list[_Pair], gradients: Sequence[_Pair | None]) -> dict[int, Tensor]:
    """u . dy of each unit, shape (units,), of the layers all of whose calls have a gradient."""
    missing = {index for (index, _), gradient in zip(slots, gradients, strict=True) if gradient is None}
    products: dict[int, Tensor] = {}
    for (index, _), change, gradient in zip(slots, changes, gradients, strict=True):
        if gradient is not None and index not in missing:
            product = (change[0] * gradient[0].double() + change[1] * gradient[1].double()).sum(1)
            products[index] = products[index] + product if index in products else product
    return products


def _change(sample: Sample, slot: Slot, leaves: Leaves, record: Recorded) -> _Pair:
    """A' - A and B' - B of each unit, float64."""
    values = sample.corrections(record, sample.runner.layers.layers[slot[0]])
    repeats = leaves.scale.shape[0] // values.r.shape[0]
    # z_train = r' * (z_test - d) / r + d', with r' = 1 and d' = 0 for BN
    ratio, shift = values.r_clipped / values.r, values.d_clipped - values.d * values.r_clipped / values.r
    ratio, shift = (value.repeat_interleave(repeats, 0) for value in (ratio, shift))
    scale = leaves.scale.detach().double()
    return scale * (ratio - 1), scale * shift

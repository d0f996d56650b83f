"""What the model's output changes if some layers normalize with their batch's statistics, all else on the eval path.

Measured by swapping the statistics of a layer, and estimated to first order for all layers in a few backward passes.
The swap turns a layer's output A * z + B, z normalized by the running statistics, into A' * z + B' with A' = A / r and
B' = B - A * d / r per micro-batch, since z_train = (z_test - d) / r. So far this is exact. What it does to the outputs
y is linearized, dy = dy/dA (A' - A) + dy/dB (B' - B), and |dy|^2 is the mean of (u . dy)^2 over random vectors u with
E[u u'] = I (after Hutchinson 1990), for which u . dy takes one backward pass that serves all layers. Samples are
independent on the eval path, so that each gives a product of its own; where they are not, each micro-batch does. The
vectors of a sample are orthogonal: as many as it has outputs leave no error of theirs at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnprobe.errors import DeviceError, UserCodeError
from bnprobe.measure.batch import CannotEmulateError, join, map_leaves
from bnprobe.measure.forward_pass import Leaves, Pass, Recorded, Slot, corrections_of
from bnprobe.measure.layers import ProbedLayer
from bnprobe.measure.outputs import floating, square_norm
from bnprobe.measure.physical_batch import Batching
from bnprobe.measure.scores import Found, ScoreTable, score_outputs
from bnprobe.measure.session import Outputs, Session
from bnprobe.records import Impact
from bnprobe.stats.moments import Corrections, wide

Result = TypeVar("Result")


@dataclass(frozen=True)
class Sample:
    """What is run.

    Attributes:
        session: Installed.
        micro_batches: On the device.
        batching: How they run.
    """

    session: Session
    micro_batches: Sequence[Any]
    batching: Batching

    def in_chunks(self, run: Callable[[Any, list[Any]], Result]) -> list[Result]:
        """Call ``run`` on physical batches, each with the micro-batches in it."""

        def joined(chunk: list[Any]) -> Result:
            return run(join(chunk, self.batching.batch_size), chunk)

        return self.batching.chunks(self.session.device).run(self.micro_batches, joined)

    def forward(self, joined: Any, micro_batches: int, **options: Any) -> tuple[Any, Outputs, Pass]:
        """One pass on the eval path; ``options`` are fields of ``Pass``."""
        pass_ = self.batching.pass_over(micro_batches, "eval", **options)
        output, recorded = self.session.forward("eval", joined, pass_)
        return output, recorded, pass_

    def corrections(self, record: Recorded, layer: ProbedLayer) -> Corrections:
        """r, d and D of each group of a call that used its running statistics."""
        return corrections_of(record, layer, self.batching.batch_size)


def summed(values: Iterable[Tensor]) -> Tensor:
    """Sum of scalars on one device; 0 on the CPU if there is none."""
    parts = list(values)
    return torch.stack(parts).sum() if parts else torch.zeros((), dtype=torch.float64)


def to_host(values: Sequence[Tensor]) -> list[float]:
    """Scalars in one transfer."""
    found: list[float] = torch.stack([value.to(values[0].device) for value in values]).tolist() if values else []
    return found


def relative_change(square: float, norm: float) -> float | None:
    """Square root of a ratio; None if it is not finite."""
    value = math.sqrt(square / norm) if norm > 0 and square >= 0 else math.nan
    return value if math.isfinite(value) else None


_PRODUCTS = 256
"""Products u . dy behind an estimate, where passes do not count: n of them, of equal |dy|, leave it a standard error
below 1 / sqrt(2 n), here 4%."""

_MOST_DRAWS = 16
"""Backward passes over the same samples at most."""

_ORTHOGONAL = 2**14
"""Outputs of a sample up to which its vectors are made orthogonal; beyond, random ones are so almost by themselves."""

_PRECISE = 1e-5
"""Unit in the last place of outputs that hardly depend on how a layer rounds."""

_Pair = tuple[Tensor, Tensor]
"""Of scale and shift, each of shape (units, channels)."""


def _squares(
    sample: Sample, ran: _Graph, layers: AbstractSet[int], draws: int, generator: torch.Generator
) -> dict[int, Tensor]:
    """For each layer that gradients reach the mean of (u . dy)^2, summed over units."""
    pass_, leaves = ran.pass_, ran.leaves
    slots = [slot for slot in leaves if slot[0] in layers]
    changes = [_change(sample, slot, leaves[slot], pass_.records[slot]) for slot in slots]
    apart = all(tensor.dim() > 0 and tensor.shape[0] % pass_.samples == 0 for tensor in ran.outputs)
    differentiable = [tensor for tensor in ran.outputs if tensor.requires_grad and tensor.numel()]
    streams = [_directions(tensor, draws, generator) for tensor in differentiable]
    squares: dict[int, list[Tensor]] = {}
    for draw in range(draws):
        vectors = [next(stream) for stream in streams]
        gradients = _gradients(differentiable, vectors, [leaves[slot] for slot in slots], keep=draw + 1 < draws)
        for index, product in _products(slots, changes, gradients).items():
            squares.setdefault(index, []).append((product if apart else product.sum()).square().sum())
    return {index: summed(values) / draws for index, values in squares.items()}


@dataclass(frozen=True)
class _Graph:
    """A pass that can be differentiated.

    Attributes:
        outputs: Floating tensors of what forward returned.
        pass_: What it recorded.
        leaves: Scale and shift of each call.
    """

    outputs: list[Tensor]
    pass_: Pass
    leaves: dict[Slot, Leaves]


def _gradients(
    outputs: list[Tensor], vectors: list[Tensor], leaves: list[Leaves], keep: bool
) -> Sequence[_Pair | None]:
    """Gradient of u . y with respect to scale and shift of each call; None where there is none."""
    if not outputs or not leaves:
        return [None] * len(leaves)
    inputs = [tensor for leaf in leaves for tensor in (leaf.scale, leaf.shift)]
    with torch.enable_grad():  # of numbers: of tensors, with vectors, it would import sympy, which takes half a second
        products = [(tensor * vector).sum() for tensor, vector in zip(outputs, vectors, strict=True)]
    found = torch.autograd.grad(products, inputs, retain_graph=keep, allow_unused=True)
    pairs = zip(found[::2], found[1::2], strict=True)
    return [None if one is None or other is None else (one, other) for one, other in pairs]


def _directions(tensor: Tensor, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Random vectors for an output, without end; those of one row are orthogonal to each other as far as they can."""
    rows = tensor.shape[0] if tensor.dim() else 1
    size = tensor.numel() // rows
    columns = min(draws, size) if size <= _ORTHOGONAL else 1
    while True:
        block = torch.randn(rows, size, columns, generator=generator, device=tensor.device, dtype=wide(tensor.dtype))
        if size <= _ORTHOGONAL:
            basis, triangle = torch.linalg.qr(block)
            # Without the signs it would not be random: one output per sample would always have the same one.
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
    values = sample.corrections(record, sample.session.layers.layers[slot[0]])
    repeats = leaves.scale.shape[0] // values.r.shape[0]
    # z_train = r' * (z_test - d) / r + d', with r' = 1 and d' = 0 for BN
    ratio, shift = values.r_clipped / values.r, values.d_clipped - values.d * values.r_clipped / values.r
    ratio, shift = (value.repeat_interleave(repeats, 0) for value in (ratio, shift))
    scale = leaves.scale.detach().double()
    return scale * (ratio - 1), scale * shift


SAMPLES = 64
"""Samples that impacts are measured on; a backward pass keeps all of their activations."""

WORST = 5
"""Layers that are measured, worst first by the estimate; and as many of those that have no estimate."""

_FEWEST_DRAWS = 2
"""Backward passes at least. One takes as long as a forward pass, since weights get no gradients."""

FEWEST_PASSES = 2 + _FEWEST_DRAWS
"""Over each sample: the graph, which is the reference, the backward passes, and the worst layer. In half precision the
reference is one more."""

_FEWEST_BATCHES = 2
"""Lower limit on the micro-batches, however large they are: one says little about the next."""


class Impacts:
    """What layers do to the outputs: of each by itself and of several together, against one reference pass.

    Args:
        session: Installed whenever something is measured.
        micro_batches: On the device.
        batching: How they run.
        coupled: Some layers normalize with batch statistics at inference, so that samples reach each other's outputs.
    """

    def __init__(
        self, session: Session, micro_batches: Sequence[Any], batching: Batching, coupled: bool = False
    ) -> None:
        most = max(_FEWEST_BATCHES, SAMPLES // batching.batch_size)
        # A graph keeps about three times what a pass without one is planned to take.
        at_once = 1 if coupled else max(1, batching.at_once // 2)
        self._sample = Sample(session, micro_batches[:most], replace(batching, at_once=at_once))
        self._per_sample = batching.emulation.trusted and not coupled
        self._layers = frozenset(layer.index for layer in session.layers.selected)
        self._references: dict[tuple[int, int], _Reference] = {}

    def of_each(self, passes: int | None = None) -> dict[int, Impact]:
        """Impact of each layer by itself: estimated for all, measured for the worst.

        The estimate (see the head of this module) assumes that nothing downstream bends much over the change. For small
        networks whose running means are off by a tenth of a standard deviation and variances by 20%, 395 of 396
        estimates were within a quarter of the exact figure, and 90% within 12%. It grows worse with the mismatch and
        with what follows: up to 41% too high for the first of 15 layers, up to 80% off with statistics that fit no data
        and r far from 1. Fewer backward passes add their own noise: over 8 samples two of them leave a standard error
        of at most 18%. The exact figure is the swap itself, one forward pass per layer.

        Args:
            passes: Over each sample at most, but at least ``FEWEST_PASSES``; None: as many as 256 products for each
                estimate take, and the five worst layers.

        Returns:
            For each selected layer that uses its running statistics on the eval path. ``loss`` is the mean over
            micro-batches.

        Raises:
            DeviceError, UserCodeError, DataError: As in any pass on the eval path; an estimate that fails is None.
        """
        draws, worst = self._planned(passes)
        estimates, mismatch = self._estimates(draws), self._mismatches()
        known = sorted(estimates, key=lambda index: -estimates[index])
        unknown = sorted(mismatch.keys() - estimates.keys(), key=lambda index: (-mismatch[index], index))
        chosen = [*known[:worst], *unknown[:worst]]
        swapped = self._swapped([frozenset({index}) for index in chosen])
        measured = dict(zip(chosen, swapped, strict=True))
        return {index: Impact(estimates.get(index), *measured.get(index, (None, None))) for index in sorted(mismatch)}

    def together(self, layers: frozenset[int]) -> float | None:
        """Measured relative L2 change of the outputs if all of these layers normalize with their batch's statistics.

        Returns:
            None if there is no output to compare, or it is not finite, or zero everywhere.
        """
        return self._swapped([layers])[0][0]

    def _planned(self, passes: int | None) -> tuple[int, int]:
        """Backward passes, and layers to measure."""
        sample = self._sample
        units = len(sample.micro_batches) * (sample.batching.batch_size if self._per_sample else 1)
        enough = min(_MOST_DRAWS, -(-_PRODUCTS // max(units, 1)))
        if passes is None:
            return enough, WORST
        left = max(passes, FEWEST_PASSES) - 1
        draws = min(enough, left - 1)
        return draws, min(WORST, left - draws)

    def _estimates(self, draws: int) -> dict[int, float]:
        """Estimated relative L2 change of the outputs for each layer by itself, from so many backward passes.

        Without the layers that no gradient reaches, in all of their calls; empty if the model cannot be differentiated.
        """
        sample, generator = self._sample, torch.Generator(self._sample.session.device).manual_seed(0)

        def run(joined: Any, chunk: list[Any]) -> tuple[Tensor, dict[int, Tensor]]:
            ran = self._with_graph(joined, chunk)
            squares = _squares(sample, ran, self._layers, draws, generator)
            return summed(map(square_norm, ran.outputs)), squares

        try:
            parts = sample.in_chunks(run)
        except (UserCodeError, DeviceError, CannotEmulateError, RuntimeError):
            # It ran without a graph before: what fails is differentiating it (numpy, no derivative, no memory).
            return {}
        reached = [index for index in self._layers if all(index in squares for _, squares in parts)]
        sums = [summed(squares[index] for _, squares in parts) for index in reached]
        norm, *host = to_host([summed(norm for norm, _ in parts), *sums])
        found = {index: relative_change(square, norm) for index, square in zip(reached, host, strict=True)}
        return {index: value for index, value in found.items() if value is not None}

    def _with_graph(self, joined: Any, chunk: list[Any]) -> _Graph:
        """A pass that can be differentiated, which is the reference as well."""
        leaves: dict[Slot, Leaves] = {}
        with torch.enable_grad():
            output, recorded, pass_ = self._sample.forward(
                joined, len(chunk), per_sample=self._per_sample, leaves=leaves
            )
        outputs, session = floating(output), self._sample.session
        # In half precision the layers with leaves round otherwise than those of the passes to be compared.
        precise = session.autocast is None and all(torch.finfo(each.dtype).eps < _PRECISE for each in outputs)
        if precise:
            alone = {key: map_leaves(value, _without_graph) for key, value in recorded.items()}
            scores = self._scores(chunk, alone)
            self._references[_key(chunk)] = _Reference([each.detach() for each in outputs], scores, pass_.records)
        return _Graph(outputs, pass_, leaves)

    def _reference(self, joined: Any, chunk: list[Any]) -> _Reference:
        """The pass in which every layer does as it does at inference; run once."""
        key = _key(chunk)
        if key not in self._references:
            output, recorded, pass_ = self._sample.forward(joined, len(chunk))
            # Right away: the loss may call the model again, and is then answered as in the last pass.
            self._references[key] = _Reference(floating(output), self._scores(chunk, recorded), pass_.records)
        return self._references[key]

    def _mismatches(self) -> dict[int, float]:
        """Mean D of the selected layers that use their running statistics on the eval path; infinite if not finite."""
        sample, session = self._sample, self._sample.session
        found: dict[int, list[Tensor]] = {}
        for reference in sample.in_chunks(self._reference):
            for (index, _), record in reference.records.items():
                if index in self._layers and not record.by_batch:
                    corrected = sample.corrections(record, session.layers.layers[index])
                    found.setdefault(index, []).append(corrected.mismatch.mean())
        host = to_host([summed(values) / len(values) for values in found.values()])
        return {i: value if math.isfinite(value) else math.inf for i, value in zip(found, host, strict=True)}

    def _swapped(self, swaps: Sequence[frozenset[int]]) -> list[tuple[float | None, float | None]]:
        """For each set of layers: measured relative change of the outputs, and change of the loss."""
        if not swaps or not self._sample.micro_batches:
            return [(None, None)] * len(swaps)
        parts = self._sample.in_chunks(lambda joined, chunk: self._measure(joined, chunk, swaps))
        norm, *squares = to_host([summed(column) for column in zip(*(squares for squares, _ in parts), strict=True)])
        before, *after = (_loss(column) for column in zip(*(values for _, values in parts), strict=True))
        losses = [None if loss is None or before is None else loss - before for loss in after]
        return [(relative_change(square, norm), loss) for square, loss in zip(squares, losses, strict=True)]

    def _measure(
        self, joined: Any, chunk: list[Any], swaps: Sequence[frozenset[int]]
    ) -> tuple[list[Tensor], list[Found]]:
        """|y|^2 and |dy|^2 of each swap; the values of the loss without and with each."""
        sample, reference = self._sample, self._reference(joined, chunk)
        squares = [summed(map(square_norm, reference.outputs))]
        values = [reference.scores]
        for layers in swaps:
            output, recorded, _ = sample.forward(joined, len(chunk), by_batch=layers, moments=False)
            squares.append(summed(map(square_norm, _differences(floating(output), reference.outputs))))
            values.append(self._scores(chunk, recorded))
        return squares, values

    def _scores(self, chunk: list[Any], recorded: Outputs) -> Found:
        session = self._sample.session
        if session.functions.loss is None:
            return {}
        return score_outputs(session, "eval", chunk, recorded, self._sample.batching.batch_size)


@dataclass(frozen=True)
class _Reference:
    """A pass without a swap.

    Attributes:
        outputs: Floating tensors of what forward returned.
        scores: The loss of each micro-batch.
        records: The moments of its layers.
    """

    outputs: list[Tensor]
    scores: Found
    records: Mapping[Slot, Recorded]


def _without_graph(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _key(chunk: list[Any]) -> tuple[int, int]:
    return id(chunk[0]), len(chunk)


def _loss(parts: Iterable[Found]) -> float | None:
    table = ScoreTable()
    for found in parts:
        table.add(found)
    return table.score("eval").loss


def _differences(tensors: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
    """Differences of outputs; NaN if the shapes differ."""
    if [tensor.shape for tensor in tensors] != [tensor.shape for tensor in reference]:
        return [tensor.new_full((), math.nan) for tensor in reference]
    return [one - other for one, other in zip(tensors, reference, strict=True)]

"""The backward pass: how noisy its batch statistics are, and what batch statistics do to the gradient.

BN's backward pass has batch statistics of its own, g_B and Psi_B of Yan et al. 2020 (arXiv 2001.06838, section 3). With
xhat the normalized input and g the gradient of the loss with respect to it, per channel over the n values of a batch,

    dL/dx = (g - E[g] - xhat * E[g * xhat]) / sqrt(v_B + eps).

Here g is the gradient of BN's output, weight * xhat + bias: a factor per channel, which the noise as a fraction of g^2
does not contain, and which may be 0 in a new network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bnprobe.errors import NonFiniteError
from bnprobe.measure.forward_pass import LayerStatistics
from bnprobe.measure.hooks import Answer, Intercepted
from bnprobe.measure.norms import NormCall, WholeModule
from bnprobe.measure.restore import seed_everything
from bnprobe.measure.session import Session
from bnprobe.measure.training_copy import TrainingCopy, call_moments, training
from bnprobe.records import Backward, GradientAngle
from bnprobe.stats.backward import backward_noise
from bnprobe.stats.moments import pool_moments, wide
from bnprobe.wording import option

_HALF_SCALE = 1024.0
"""Factor on the loss under float16 autocast, whose smallest value gradients would fall below; nothing here depends on
the scale of gradients."""

_REMEDY = "Gradients cannot be compared without a finite loss: look at the model, its weights and the loss."


def measure_gradients(
    session: Session, micro_batches: Iterable[Any], *, seed: int = 0
) -> tuple[dict[int, Backward], GradientAngle | None]:
    """Run the loss backwards on a copy, in training. Model and random state come back bit-identical.

    Args:
        session: The model, all its norm layers and the user's loss.
        micro_batches: The user's, on the host.
        seed: Dropout and the like draw the same numbers for both gradients of a micro-batch.

    Returns:
        The noise of each layer, by its index, where a gradient reached the layer in two micro-batches at least; and
        the angle between the gradients with batch statistics and with the pooled statistics of all these micro-batches
        as constants, None if no gradient is finite and not 0.

    Raises:
        UsageError: No loss, or one that cannot be trained with.
        ModelError: The model cannot be copied.
        UserCodeError: The user's code raised.
        NonFiniteError: A loss or gradient is NaN or Inf; names the micro-batch and the layer.
        DeviceError: Out of memory.
    """
    with training():
        trained = TrainingCopy(session, "--gradients")
        if not trained.parameters:
            return {}, None
        micro_batches = list(micro_batches)
        population = _pooled(trained, micro_batches, seed)
        records: dict[tuple[int, int], list[Tensor]] = {}
        comparison = _Comparison()
        for position, batch in enumerate(micro_batches):
            gradients = _Gradients()
            by_batch = _gradient(trained, batch, gradients.answer, seed, position)
            gradients.require_finite(position)
            by_population = _gradient(trained, batch, _answer_with(population), seed, position)
            comparison.add(by_batch, by_population)
            for slot, record in gradients.records.items():
                records.setdefault(slot, []).append(record)
        return _noise(records), comparison.result()


def _gradient(trained: TrainingCopy, batch: Any, answer: Answer, seed: int, position: int) -> list[Tensor | None]:
    """The parameters' gradient of one micro-batch; None where a parameter has no part in the loss."""
    trained.put_back()
    seed_everything((seed + position) % 2**32)
    value = trained.loss(batch, answer)
    trained.require_finite(value, batch, f"in micro-batch {position + 1} (the first is 1)", _REMEDY)
    scale = _HALF_SCALE if trained.autocast is torch.float16 else 1.0
    trained.backward(value * scale, answer)
    return [parameter.grad for parameter in trained.parameters]


def _normalizes_by_batch(call: NormCall) -> bool:
    return call.training or call.running_mean is None


def _pooled(trained: TrainingCopy, micro_batches: Sequence[Any], seed: int) -> LayerStatistics:
    """Mean and total variance over all calls of all micro-batches, of the layers that normalize by batch."""
    moments: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def note(found: Intercepted) -> Tensor:
        if _normalizes_by_batch(found.call):
            moments.setdefault(found.layer.index, []).append(call_moments(found.call))
        return found.run()

    # With a graph that nobody needs: checkpoint(use_reentrant=True) warns where there is none.
    for position, batch in enumerate(micro_batches):
        seed_everything((seed + position) % 2**32)
        with trained.watching() if position == 0 else nullcontext():
            trained.loss(batch, note)
        trained.put_back()
    return {index: _pool(seen) for index, seen in moments.items()}


def _pool(seen: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    means, variances = (torch.stack(column) for column in zip(*seen, strict=True))
    mean, variance = pool_moments(means, variances, len(seen))
    return mean[0], variance[0]


def _answer_with(population: LayerStatistics) -> Answer:
    """Layers that would normalize by their batch use the population's statistics instead, as constants."""

    def answer(found: Intercepted) -> Tensor:
        layer, call = found.layer, found.call
        if not _normalizes_by_batch(call) or layer.index not in population:
            return found.run()
        dtype = _dtype_of_statistics(call)
        mean, variance = (each.to(call.input.device, dtype) for each in population[layer.index])
        return layer.family.evaluate(replace(call, running_mean=mean, running_variance=variance, training=False))

    return answer


def _dtype_of_statistics(call: NormCall) -> torch.dtype:
    for tensor in (call.running_mean, call.weight):
        if tensor is not None:
            return tensor.dtype
    return wide(call.input.dtype)


@dataclass
class _Gradients:
    """What the backward pass of one micro-batch shows, by layer and number of its call.

    Attributes:
        calls: Calls of each layer through which a gradient may come back. The first pass of
            ``checkpoint(use_reentrant=True)`` is none: its recomputation is.
        records: E[g], E[g * xhat] and E[g^2] of each call, float64 of shape (3, channels).
    """

    calls: dict[int, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    records: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def answer(self, found: Intercepted) -> Tensor:
        """Run the call, and look at the gradient of its output when there is one."""
        layer, call, output = found.layer, found.call, found.run()
        # The output of a module with arithmetic of its own is not seen here, its input is.
        if not _normalizes_by_batch(call) or not output.requires_grad or isinstance(layer.family, WholeModule):
            return output
        slot = layer.index, self.calls.get(layer.index, 0)
        self.calls[layer.index] = slot[1] + 1
        self.names[layer.index] = layer.name
        moments, inputs = call_moments(call), call.input.detach()

        def record(gradient: Tensor) -> None:
            self.records[slot] = _backward_statistics(gradient.detach(), inputs, *moments, call.eps)

        output.register_hook(record)
        return output

    def require_finite(self, position: int) -> None:
        """Refuse gradients that are NaN or Inf.

        Raises:
            NonFiniteError: Names the layer nearest to the loss that has one.
        """
        for (index, _), record in self.records.items():
            if not bool(torch.isfinite(record).all()):
                raise NonFiniteError(
                    f"The gradient of the output of {self.names[index]} holds NaN or Inf in micro-batch {position + 1}"
                    f" (the first is 1). Look at what follows this layer; with {option('--autocast', 'float16')}, use"
                    " bfloat16."
                )


def _backward_statistics(gradient: Tensor, inputs: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """E[g], E[g * xhat] and E[g^2] per channel, float64 of shape (3, channels).

    Args:
        gradient, inputs: Shape (rows, channels, *space).
        mean, variance: Of ``inputs``, shape (channels,).
    """
    others = [axis for axis in range(inputs.dim()) if axis != 1]
    dtype = wide(gradient.dtype)
    g = gradient.to(dtype)
    shape = [1, -1] + [1] * (inputs.dim() - 2)
    centred = inputs.to(dtype) - mean.to(dtype).reshape(shape)
    product = (g * centred).mean(others, dtype=torch.float64) / (variance + eps).sqrt()
    return torch.stack([g.mean(others, dtype=torch.float64), product, g.square().mean(others, dtype=torch.float64)])


def _noise(records: Mapping[tuple[int, int], list[Tensor]]) -> dict[int, Backward]:
    """The noise of each layer; calls of one layer stand side by side, like channels."""
    whole = max((len(seen) for seen in records.values()), default=0)
    of_layer: dict[int, list[Tensor]] = {}
    for (index, _), seen in records.items():
        if len(seen) == whole:  # a call that not every micro-batch makes cannot stand beside the others
            of_layer.setdefault(index, []).append(torch.stack(seen).cpu())
    found = {index: backward_noise(*torch.cat(calls, 2).unbind(1)) for index, calls in of_layer.items()}
    return {index: backward for index, backward in found.items() if backward is not None}


@dataclass
class _Comparison:
    """Sums over micro-batches of the two gradients, float32, and of their cosine."""

    sums: list[list[Tensor | None]] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)

    def add(self, by_batch: list[Tensor | None], by_population: list[Tensor | None]) -> None:
        """Add the gradients of one micro-batch."""
        pair = [[None if g is None else _dense(g) for g in side] for side in (by_batch, by_population)]
        cosine = _cosine(*pair)
        if cosine is None:
            return
        self.cosines.append(cosine)
        self.sums = [_added(*sides) for sides in zip(self.sums, pair, strict=True)] if self.sums else pair

    def result(self) -> GradientAngle | None:
        """The record; None if there was nothing to compare."""
        mean_cosine = _cosine(*self.sums) if self.sums else None
        if mean_cosine is None:
            return None
        return GradientAngle(sum(self.cosines) / len(self.cosines), mean_cosine, len(self.cosines))


def _dense(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return dense.to(wide(dense.dtype))


def _added(totals: list[Tensor | None], gradients: list[Tensor | None]) -> list[Tensor | None]:
    pairs = zip(totals, gradients, strict=True)
    return [gradient if total is None else total if gradient is None else total + gradient for total, gradient in pairs]


def _cosine(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> float | None:
    """Cosine of two gradients; a parameter without one counts as 0. None if one is 0, NaN or Inf."""
    product = _dot(left, right)
    scale = (_dot(left, left) * _dot(right, right)) ** 0.5
    return max(-1.0, min(1.0, product / scale)) if 0.0 < scale < float("inf") else None


def _dot(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> float:
    pairs = zip(left, right, strict=True)
    parts = [(a * b).sum(dtype=torch.float64) for a, b in pairs if a is not None and b is not None]
    return float(torch.stack(parts).sum()) if parts else 0.0

"""The seam between probing and a family of normalization layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bnprobe.stats.mismatch import Corrections, corrections


@dataclass(frozen=True)
class NormCall:
    """What a layer asked its functional form to do.

    Attributes:
        input: Shape (rows, channels, *space).
        running_mean, running_variance: Shape (channels,); None where the layer keeps none.
        weight, bias: Shape (channels,); None without affine parameters.
        training: Normalize with the statistics of the batch.
        eps: Added to the variance inside the root.
        r_max, d_max: Limits of Batch Renorm's correction in training; 1 and 0: plain BN.
        gate: Part of the way that gated BN stays with the batch, shape (channels,); None: 0.
    """

    input: Tensor
    running_mean: Tensor | None
    running_variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    eps: float
    r_max: float = 1.0
    d_max: float = 0.0
    gate: Tensor | None = None

    def corrections(self, mean: Tensor, variance: Tensor) -> Corrections | None:
        """The layer's correction of batch statistics of shape (batches, channels), float64; None for plain BN.

        Constants for the gradient.
        """
        if (self.r_max, self.d_max) == (1, 0) or self.running_mean is None or self.running_variance is None:
            return None
        running = self.running_mean.to(mean), self.running_variance.to(mean)
        eps, r_max, d_max = (torch.full_like(running[0], limit) for limit in (self.eps, self.r_max, self.d_max))
        gate = None if self.gate is None else self.gate.to(mean)
        return corrections(mean.detach(), variance.detach(), *running, eps, r_max, d_max, gate)


@dataclass(frozen=True)
class NormInfo:
    """What a layer is set to.

    Attributes:
        channels: Number of channels.
        eps: Added to the variance inside the root.
        momentum: Weight of the new batch in the running average; None: cumulative average.
        batches_tracked: Updates of the running statistics so far; None if the layer does not count.
        running_mean, running_variance: Shape (channels,), the variance unbiased; None where none are kept.
        r_max, d_max: Limits of Batch Renorm's correction in training; 1 and 0: plain BN.
        gate: As in ``NormCall``.
    """

    channels: int
    eps: float
    momentum: float | None
    batches_tracked: int | None
    running_mean: Tensor | None
    running_variance: Tensor | None
    r_max: float = 1.0
    d_max: float = 0.0
    gate: Tensor | None = None

    @property
    def corrects(self) -> bool:
        """Whether the layer corrects its batch statistics in training, as Batch Renorm and gated BN do."""
        return (self.r_max, self.d_max) != (1, 0)


class NormFamily(Protocol):
    """A family of layers that end in the same functional form.

    Probing intercepts that functional form, not the layer's ``forward``: a subclass that does more than normalize
    (an activation, a drop block) keeps doing it.
    """

    @property
    def functionals(self) -> tuple[Callable[..., Tensor], ...]:
        """The functions whose calls are intercepted."""

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is a layer of this family (subclasses included)."""

    def obstacle(self, module: nn.Module) -> str | None:
        """Why this layer cannot be probed as it stands, or None."""

    def describe(self, module: nn.Module) -> NormInfo:
        """The settings of a layer that has no obstacle."""

    def parse(self, *args: Any, **kwargs: Any) -> NormCall:
        """Read the arguments of a call of one of ``functionals``."""

    def evaluate(self, call: NormCall) -> Tensor:
        """The layer's own output with its running statistics."""

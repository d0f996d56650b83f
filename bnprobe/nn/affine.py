"""The affine map between two normalizations of the same input, which Batch Renorm and its relatives are made of.

Two normalizations of x by statistics A and B differ by an affine map per channel, whatever the data:

    z_A = (x - mean_A) / sqrt(var_A + eps)        z_B = scale * z_A + shift
    scale = sqrt(var_A + eps) / sqrt(var_B + eps)         shift = (mean_A - mean_B) / sqrt(var_B + eps)

From batch to running statistics, (scale, shift) are the r and d of Batch Renormalization (Ioffe 2017, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """What a normalization subtracts and divides by.

    Attributes:
        mean: Any shape, e.g. (channels,), or (images, channels) for statistics of single images.
        variance: Broadcasts with ``mean``; biased, as every normalization has it.
        eps: Added to the variance inside the root.
    """

    mean: Tensor
    variance: Tensor
    eps: float = 1e-5

    @property
    def deviation(self) -> Tensor:
        """sqrt(variance + eps)."""
        return (self.variance + self.eps).sqrt()


@dataclass(frozen=True)
class AffineMap:
    """z -> scale * z + shift, per channel.

    Attributes:
        scale, shift: Shape (channels,) or (images, channels), or any shapes that broadcast.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def between(cls, source: Statistics, target: Statistics) -> AffineMap:
        """What turns an input normalized by ``source`` into the same input normalized by ``target``.

        Shapes may differ: statistics of images, (images, channels), to statistics of channels, (channels,).
        """
        deviation = target.deviation
        return cls(source.deviation / deviation, (source.mean - target.mean) / deviation)

    @classmethod
    def identity(cls, like: Tensor) -> AffineMap:
        """The map that changes nothing, of the shape, dtype and device of ``like``."""
        return cls(torch.ones_like(like), torch.zeros_like(like))

    def __call__(self, z: Tensor) -> Tensor:
        """Apply to z of shape (images, channels, *space)."""
        space = (1,) * (z.dim() - 2)
        return torch.addcmul(self.shift.unflatten(-1, (-1, *space)), z, self.scale.unflatten(-1, (-1, *space)))

    def inverse(self) -> AffineMap:
        """The way back."""
        return AffineMap(self.scale.reciprocal(), -self.shift / self.scale)

    def then(self, following: AffineMap) -> AffineMap:
        """This map, and ``following`` on its result."""
        return AffineMap(following.scale * self.scale, following.scale * self.shift + following.shift)

    def clamp(self, r_max: float | Tensor, d_max: float | Tensor) -> AffineMap:
        """Scale limited to [1 / r_max, r_max] and shift to [-d_max, d_max] (Ioffe 2017, algorithm 1).

        Args:
            r_max: At least 1; at 1, the scale is 1.
            d_max: At least 0; at 0, the shift is 0.
        """
        return AffineMap(_clip(self.scale, 1 / r_max, r_max), _clip(self.shift, -d_max, d_max))

    def blend(self, weight: float | Tensor) -> AffineMap:
        """A part of the way: (1 - weight) * z_A + weight * z_B.

        Args:
            weight: 0: the identity; 1: this map. A number, or a tensor that broadcasts, e.g. (channels,).
        """
        return AffineMap(1 + weight * (self.scale - 1), weight * self.shift)

    def fold(self, weight: Tensor | None, bias: Tensor | None) -> AffineMap:
        """This map and then a layer's weight and bias, as one weight and bias.

        Args:
            weight, bias: Shape (channels,); None: 1 and 0.
        """
        scale = self.scale if weight is None else weight * self.scale
        if weight is None or bias is None:
            shift = self.shift if weight is None else weight * self.shift
            return AffineMap(scale, shift if bias is None else shift + bias)
        return AffineMap(scale, torch.addcmul(bias, weight, self.shift))

    def detach(self) -> AffineMap:
        """The same map, constant for the gradient."""
        return AffineMap(self.scale.detach(), self.shift.detach())


def _clip(values: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        return torch.clamp(values, low.to(values), high.to(values))
    return torch.clamp(values, float(low), float(high))

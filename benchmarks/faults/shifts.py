"""How data differs between training and evaluation: functions of the inputs, most of them made from a strength."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.faults.samples import Samples

Shift = Callable[[Tensor], Tensor]


def brightness(amount: float) -> Shift:
    """An offset, in standard deviations of the inputs."""
    return lambda inputs: inputs + amount * inputs.std()


def contrast(scale: float) -> Shift:
    """Another scale."""
    return lambda inputs: inputs * scale


def noise(amount: float) -> Shift:
    """Noise, in standard deviations of the inputs; always the same."""

    def change(inputs: Tensor) -> Tensor:
        drawn = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3))
        return inputs + amount * inputs.std() * drawn

    return change


def blur(times: int) -> Shift:
    """Images (N, C, H, W), each pixel the mean of 3x3, so many times."""

    def change(images: Tensor) -> Tensor:
        for _ in range(times):
            images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
        return images

    return change


def resized(side: int) -> Shift:
    """Images at ``side`` pixels a side, and back."""

    def change(images: Tensor) -> Tensor:
        small = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return F.interpolate(small, images.shape[2:], mode="bilinear")

    return change


def padded(side: int) -> Shift:
    """Images shrunk to ``side`` pixels a side, in a frame of zeros."""

    def change(images: Tensor) -> Tensor:
        small = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        missing = images.shape[-1] - side
        before = missing // 2
        return F.pad(small, (before, missing - before, before, missing - before))

    return change


def lowered(inputs: Tensor) -> Tensor:
    """Values well below 0, like logarithms of energies."""
    return inputs - 2


def ragged(samples: Samples, shortest: int) -> Samples:
    """Signals (N, C, T) below 0, cut at random lengths and filled up with zeros."""
    generator = torch.Generator().manual_seed(4)
    steps = samples.inputs.shape[2]
    length = torch.randint(shortest, steps + 1, (len(samples), 1, 1), generator=generator)
    return replace(samples, inputs=lowered(samples.inputs) * (torch.arange(steps) < length))

"""Small networks, with any normalization, and how they are trained and scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnprobe.lab.data import load
from bnprobe.lab.layers import BatchNorm, batch_moments
from bnprobe.nn import DomainBatchNorm2d
from bnprobe.numbers import count, joined

Norm = Callable[[int], nn.Module]
"""Makes the normalization of so many channels."""


def no_norm(channels: int) -> nn.Module:
    """No normalization."""
    return nn.Identity()


def conv_net(shape: torch.Size | tuple[int, ...], classes: int, norm: Norm) -> nn.Sequential:
    """Three convolutions, each with a normalization and ReLU behind it, mean over positions, a linear layer.

    Args:
        shape: Of an image: (channels, height, width).
        classes: Outputs.
        norm: Makes the normalizations.
    """
    sizes = [shape[0], 16, 32, 32]
    layers: list[nn.Module] = []
    for position, (before, after) in enumerate(pairwise(sizes)):
        layers += [nn.Conv2d(before, after, 3, stride=1 + (position == 1), padding=1), norm(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(sizes[-1], classes))


def conv_net_architecture(data: str | None) -> str:
    """What `conv_net` is for the images of ``--data``, with batch norm, a sentence for reports."""
    images = load(data)
    with torch.device("meta"):  # no weights are drawn
        return architecture(conv_net(images.train.shape[1:], images.classes, BatchNorm))


def architecture(model: nn.Sequential) -> str:
    """Channels and parameters of a network of convolutions, which may end in a linear layer, a sentence for reports.

    Behind each convolution, or each but the last, come a normalization and ReLU; before the linear layer comes a mean
    over positions.
    """
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Conv3d)]
    channels = [
        f"{layer.out_channels} (stride {layer.stride[0]})" if layer.stride[0] > 1 else f"{layer.out_channels}"
        for layer in convolutions
    ]
    kernel = " x ".join(map(str, convolutions[0].kernel_size))
    behind = "each" if sum(isinstance(layer, nn.ReLU) for layer in model) == len(channels) else "each but the last"
    last = model[-1]
    end = f", then a mean over positions and {last.out_features} linear outputs" if isinstance(last, nn.Linear) else ""
    return (
        f"The network has convolutions of {kernel} from {count(convolutions[0].in_channels, 'channel')} to"
        f" {joined(channels)}, a normalization and ReLU behind {behind}{end}; with batch norm these are"
        f" {sum(each.numel() for each in model.parameters()):,} parameters."
    )


def train(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    rate: float,
    after_step: Callable[[int, float], None] | None = None,
    decay_over: int | None = None,
) -> None:
    """Train a classifier with SGD and momentum 0.9, in train mode.

    Args:
        model: Changed in place.
        batches: One for each step.
        rate: Learning rate.
        after_step: Called with the number of the step, from 0, and the loss of its batch; gradients are still there.
        decay_over: Steps in which the rate falls to 0, along half a cosine; None: it stays.
    """
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, decay_over) if decay_over else None
    for step, (images, labels) in enumerate(batches):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        if after_step is not None:
            after_step(step, loss.item())


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """All `BatchNorm` layers, of which Batch Renorm is one, from the input on."""
    return [layer for layer in model.modules() if isinstance(layer, BatchNorm)]


def keep_statistics(model: nn.Module) -> None:
    """Let running statistics stay as they are in train mode, too."""
    for layer in model.modules():
        if isinstance(layer, BatchNorm | DomainBatchNorm2d):
            layer.momentum = 0.0


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 512) -> float:
    """Share of right answers, in the mode that the model is in."""
    right = 0
    for chosen, expected in zip(images.split(batch), labels.split(batch), strict=True):
        right += int((model(chosen).argmax(1) == expected).sum())
    return right / len(labels)


def held_out_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers in eval mode; the model's mode is put back."""
    was_training = model.training
    model.eval()
    try:
        return accuracy(model, images, labels)
    finally:
        model.train(was_training)


@torch.no_grad()
def input_of(model: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """What a layer gets where the model runs on these images, in the mode that it is in."""
    given: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    try:
        for part in images.split(512):
            model(part)
    finally:
        hook.remove()
    return torch.cat(given)


class Call(NamedTuple):
    """What a layer got in one call: mean and biased variance of each channel, and the number of its values."""

    mean: Tensor
    variance: Tensor
    values: int


@contextmanager
def calls_in_training(layer: nn.Module) -> Iterator[list[Call]]:
    """The calls of a layer in train mode that come in the block, as they come."""
    seen: list[Call] = []

    def look(module: nn.Module, given: tuple[Tensor]) -> None:
        x = given[0].detach()
        if module.training:
            seen.append(Call(*batch_moments(x), x.numel() // x.shape[1]))

    hook = layer.register_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def take_population(model: nn.Module, images: Tensor) -> None:
    """Set the running statistics of all `BatchNorm` layers to those of these images at inference, layer after layer.

    The model is in eval mode afterwards.
    """
    model.eval()
    for layer in batch_norms(model):
        mean, variance = batch_moments(input_of(model, layer, images))
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)

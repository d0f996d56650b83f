"""The task: a small network on digits, without one of the ten, and what becomes of its inputs in service."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

NEW_CLASS = 9
"""Left out of training and of the profile."""

TRAINING, HEALTHY, EPOCHS = 450, 650, 25


@dataclass(frozen=True)
class Task:
    """One network, with its own split of the images.

    Attributes:
        model: In eval mode.
        accuracy: On the images in service.
        healthy: What profiles and detectors are given.
        service: Other images of the same classes.
        new: Images of the class that was left out.
    """

    model: nn.Sequential
    accuracy: float
    healthy: Tensor
    service: Tensor
    new: Tensor


def make_task(seed: int) -> Task:
    """Split the images and train the network."""
    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=generator)
    images = torch.tensor(data.images, dtype=torch.float32)[:, None][order] / 16
    labels = torch.tensor(data.target)[order]
    known = labels != NEW_CLASS
    new, images, labels = images[~known], images[known], labels[known]
    torch.manual_seed(seed)
    model = _network()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAINING, generator=generator).split(32)[:-1]:
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    end = TRAINING + HEALTHY
    with torch.no_grad():
        right = model(images[end:]).argmax(1) == labels[end:]
    return Task(model, float(right.float().mean()), images[TRAINING:end], images[end:], new)


def _network() -> nn.Module:
    layers: list[nn.Module] = []
    for given, made in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(given, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if made != given and given > 1 else []
    head = [nn.Linear(32, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


Shift = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Makes of images, and those of a new class, what the model sees."""


def _noise(size: float) -> Shift:
    return lambda x, new, generator: x + size * torch.randn(x.shape, generator=generator)


def _blur(part: float) -> Shift:
    kernel = torch.full((1, 1, 3, 3), 1 / 9)
    return lambda x, new, generator: (1 - part) * x + part * F.conv2d(F.pad(x, (1, 1, 1, 1)), kernel)


def _moved(part: float) -> Shift:
    def move(x: Tensor, new: Tensor, generator: torch.Generator) -> Tensor:
        chosen = torch.rand(len(x), 1, 1, 1, generator=generator) < part
        return torch.where(chosen, F.pad(x, (1, 0))[..., :-1], x)

    return move


def _new(part: float) -> Shift:
    def mix(x: Tensor, new: Tensor, generator: torch.Generator) -> Tensor:
        chosen = torch.rand(len(x), 1, 1, 1, generator=generator) < part
        return torch.where(chosen, new[torch.randint(len(new), (len(x),), generator=generator)], x)

    return mix


SHIFTS: dict[str, tuple[Shift, Shift]] = {
    "noise (standard deviation 0.05, 0.2)": (_noise(0.05), _noise(0.2)),
    "blur (0.2, 0.7 of a 3x3 mean)": (_blur(0.2), _blur(0.7)),
    "contrast (0.9, 0.6)": (lambda x, *_: 0.9 * x, lambda x, *_: 0.6 * x),
    "brightness (+0.03, +0.2)": (lambda x, *_: x + 0.03, lambda x, *_: x + 0.2),
    "translation (a pixel; 30%, all images)": (_moved(0.3), _moved(1.0)),
    "new class (20%, all images)": (_new(0.2), _new(1.0)),
}
"""Each mild and strong."""

"""A small residual network on the UCI digits: what `bnprobe scan` needs, found by the names below."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Sampler, TensorDataset

DATA = Path(__file__).parent / "digits.npz"

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Two 3x3 convolutions with BN, and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _projection(inputs, outputs, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class DigitNet(nn.Module):
    """A residual network for 8x8 images: nine BN layers, of 12 to 32 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.blocks = nn.Sequential(Block(12, 12, 1), Block(12, 24, 2), Block(24, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 8, 8) in 0..1 -> class scores (N, 10)."""
        hidden = self.blocks(F.relu(self.bn(self.stem(images))))
        return self.head(hidden.mean(dim=(2, 3)))


class ClassRuns(Sampler[int]):
    """Runs of ``length`` images of one class, the runs in random order; incomplete runs are left out."""

    def __init__(self, labels: Tensor, length: int, generator: torch.Generator) -> None:
        self.labels, self.length, self.generator = labels, length, generator

    def __iter__(self) -> Iterator[int]:
        runs = [run for label in self.labels.unique() for run in self._runs(label)]
        for chosen in torch.randperm(len(runs), generator=self.generator).tolist():
            yield from runs[chosen].tolist()

    def __len__(self) -> int:
        return int((self.labels.bincount() // self.length).sum()) * self.length

    def _runs(self, label: Tensor) -> list[Tensor]:
        members = (self.labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=self.generator)]
        return [run for run in shuffled.split(self.length) if len(run) == self.length]


def load_model() -> nn.Module:
    """The network, untrained; the specs name the checkpoints."""
    return DigitNet()


def load_data(batch_size: int = 64, order: str = "shuffled") -> DataLoader[Batch]:
    """The 1437 training images, "shuffled" or "sorted" (every batch holds one class)."""
    return _loader(batch_size, order, held_out=False)


def load_eval_data(batch_size: int = 64, order: str = "shuffled") -> DataLoader[Batch]:
    """The 360 images that no training saw."""
    return _loader(batch_size, order, held_out=True)


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Class scores (N, 10)."""
    images, _ = batch
    return model(images)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy, in nats."""
    return F.cross_entropy(forward(model, batch), batch[1])


def metric(model: nn.Module, batch: Batch) -> Tensor:
    """Accuracy, 0 to 1."""
    return (forward(model, batch).argmax(dim=1) == batch[1]).float().mean()


def _loader(batch_size: int, order: str, *, held_out: bool) -> DataLoader[Batch]:
    dataset = _read(held_out=held_out)
    generator = torch.Generator().manual_seed(0)
    if order == "shuffled":
        return DataLoader(dataset, batch_size, shuffle=True, generator=generator, drop_last=not held_out)
    if order == "sorted":
        runs = ClassRuns(dataset.tensors[1], batch_size, generator)
        return DataLoader(dataset, batch_size, sampler=runs)
    raise ValueError(f'order is "shuffled" or "sorted", not "{order}"')


def _read(*, held_out: bool) -> TensorDataset:
    with np.load(DATA) as file:
        chosen = file["is_eval"] == held_out
        images = torch.from_numpy(file["images"][chosen]).float().div(16).unsqueeze(1)
        labels = torch.from_numpy(file["labels"][chosen]).long()
    return TensorDataset(images, labels)


def _projection(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

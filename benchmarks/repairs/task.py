"""The harder task: few images, a deeper network, and batches that harm BN in three degrees."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from benchmarks.faults.samples import Order, Samples, Sampling
from bnprobe.nn import domain

CLASSES, TRAINED_PER_CLASS, CHOOSING = 10, 32, 400
NOISE = 0.1
"""Standard deviation of what is added to pixels in 0..1."""

STEP_IMAGES = 32
"""Images of an optimizer step in every regime: 10 steps are one pass over the training images."""

Batch = tuple[Tensor, Tensor, Tensor]
"""Images (N, 1, 8, 8), their classes (N), and the camera (N) that took each."""


@dataclass(frozen=True)
class Regime:
    """How the 32 images of a step are normalized; nothing else differs between regimes.

    Attributes:
        name: For tables.
        batch_size: Images that are normalized together.
        order: "shuffled", or "grouped": every micro-batch holds one class only, or with two cameras images of one.
        seeds: Runs of every arm.
        cameras: 2: every other image is a negative.
    """

    name: str
    batch_size: int
    order: str
    seeds: int
    cameras: int = 1

    @property
    def accumulate(self) -> int:
        """Micro-batches of a step."""
        return STEP_IMAGES // self.batch_size


REGIMES = (
    Regime("i.i.d. batches of 32", 32, "shuffled", 5),
    Regime("i.i.d. micro-batches of 4", 4, "shuffled", 3),
    Regime("micro-batches of 2, of one class each", 2, "grouped", 3),
)

TWO_CAMERAS = Regime("batches of 32, of one of two cameras each", 32, "grouped", 3, cameras=2)


@dataclass(frozen=True)
class Parts:
    """Images (N, 1, 8, 8) that share no digit: to train on, to choose rates and weights by, and to prove with."""

    training: Samples
    choosing: Samples
    proving: Samples


@functools.cache
def parts() -> Parts:
    """The training images as they are; the others jittered once, as the training images are anew at every reading."""
    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).long()
    everything = Samples(torch.from_numpy(bunch.images).float().div(16).unsqueeze(1), labels, labels)
    generator = torch.Generator().manual_seed(0)
    shuffled = everything.take(torch.randperm(len(everything), generator=generator))
    trained = torch.zeros(len(shuffled), dtype=torch.bool)
    for label in range(CLASSES):
        trained[(shuffled.groups == label).nonzero().flatten()[:TRAINED_PER_CLASS]] = True
    others = shuffled.take(~trained)
    others = replace(others, inputs=jittered(others.inputs, generator))
    rows = torch.arange(len(others))
    return Parts(shuffled.take(trained), others.take(rows[:CHOOSING]), others.take(rows[CHOOSING:]))


def jittered(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image (N, 1, 8, 8) moved by up to one pixel, with noise; None: draws from torch's own stream."""
    padded = F.pad(images, (1, 1, 1, 1))
    moves = torch.randint(3, (len(images), 2), generator=generator)
    moved = torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, moves.tolist(), strict=True)])
    return moved + NOISE * torch.randn(moved.shape, generator=generator)


def loader(regime: Regime) -> DataLoader[Batch]:
    """The training images in micro-batches, jittered at every reading."""
    samples = parts().training
    cameras = _cameras(samples, regime.cameras)
    order = Order(samples.groups if regime.cameras == 1 else cameras, Sampling(regime.batch_size, order=regime.order))
    dataset = TensorDataset(samples.inputs, samples.targets, cameras)
    return DataLoader(dataset, regime.batch_size, sampler=order, collate_fn=_collated)


def held_out(samples: Samples, cameras: int = 1, most: int = 200) -> list[Batch]:
    """In batches of at most ``most`` images, of all cameras: inference does not depend on it."""
    camera = _cameras(samples, cameras)
    inputs = _taken(samples.inputs, camera)
    return list(zip(*(values.split(most) for values in (inputs, samples.targets, camera)), strict=True))


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """Class scores (N, 10); layers with statistics per domain have one for each camera."""
    with domain(batch[2]):
        scores: Tensor = model(batch[0])
    return scores


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy, in nats."""
    return F.cross_entropy(forward(model, batch), batch[1])


def accuracy(model: nn.Module, batch: Batch) -> Tensor:
    """0 to 1."""
    return (forward(model, batch).argmax(1) == batch[1]).float().mean()


class Residual(nn.Module):
    """Two convolutions with BN, and a shortcut without parameters around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(hidden + shortcut)


class DeepNet(nn.Module):
    """Fifteen BN layers of 12 to 48 channels, for images of 8x8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        shapes = [(12, 12, 1), (12, 12, 1), (12, 24, 2), (24, 24, 1), (24, 24, 1), (24, 48, 2), (48, 48, 1)]
        self.blocks = nn.Sequential(*(Residual(*shape) for shape in shapes))
        self.head = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> class scores (N, 10)."""
        hidden = self.blocks(F.relu(self.bn(self.stem(images))))
        scores: Tensor = self.head(hidden.mean(dim=(2, 3)))
        return scores


def _cameras(samples: Samples, cameras: int) -> Tensor:
    """Which camera took each image: they take turns."""
    return torch.arange(len(samples)) % cameras


def _taken(images: Tensor, camera: Tensor) -> Tensor:
    """What the cameras give: the second one negatives."""
    return torch.where(camera.view(-1, 1, 1, 1) == 0, images, 1 - images)


def _collated(samples: list[Batch]) -> Batch:
    images, labels, camera = default_collate(samples)
    return _taken(jittered(images), camera), labels, camera

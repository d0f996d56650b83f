"""Ten small architectures, of units that faults can be planted in."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Unit(nn.Module):
    """Operation, normalization, ReLU; ``drop`` comes first and does nothing until a dropout is planted."""

    def __init__(self, operation: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.drop: nn.Module = nn.Identity()
        self.operation = operation
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.operation(self.drop(x))))


class PreUnit(Unit):
    """The same with normalization and ReLU before the operation, as in dense networks."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.operation(torch.relu(self.norm(self.drop(x))))
        return result


class Plain(nn.Module):
    """Six convolutions on 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (1, 12, 12, 24, 24, 32, 32), (1, 1, 2, 1, 2, 1)
        pairs = zip(widths, widths[1:], strides, strict=False)
        self.units = nn.Sequential(*(convolution(inputs, outputs, stride) for inputs, outputs, stride in pairs))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> class scores (N, 10)."""
        scores: Tensor = self.head(self.units(x).mean((2, 3)))
        return scores


class ResidualBlock(nn.Module):
    """Two units beside a strided 1x1 convolution, or beside nothing but the input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(inputs, outputs, stride), convolution(outputs, outputs))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(x) + self.shortcut(x)
        return result


class Residual(nn.Module):
    """A stem and three residual blocks: seven BN layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(1, 12)
        self.blocks = nn.Sequential(ResidualBlock(12, 12, 1), ResidualBlock(12, 24, 2), ResidualBlock(24, 32, 2))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> class scores (N, 10)."""
        scores: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return scores


class DenseBlock(nn.Module):
    """Every unit sees the outputs of all before it."""

    def __init__(self, inputs: int, growth: int, depth: int) -> None:
        super().__init__()
        self.units = nn.ModuleList(pre_convolution(inputs + index * growth, growth) for index in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = torch.cat([x, unit(x)], dim=1)
        return x


class Dense(nn.Module):
    """A stem, two dense blocks of three units and a transition between: eight BN layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(1, 12)
        self.first = DenseBlock(12, 8, 3)
        self.transition = PreUnit(nn.Conv2d(36, 16, 1, 2, bias=False), nn.BatchNorm2d(36))
        self.second = DenseBlock(16, 8, 3)
        self.head = nn.Linear(40, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> class scores (N, 10)."""
        hidden = self.second(self.transition(self.first(self.stem(x))))
        scores: Tensor = self.head(hidden.mean((2, 3)))
        return scores


class UNet3d(nn.Module):
    """Two levels down, two up: seven BN layers."""

    def __init__(self) -> None:
        super().__init__()
        self.top = nn.Sequential(volume_convolution(1, 8), volume_convolution(8, 8))
        self.middle = volume_convolution(8, 12, 2)
        self.bottom = nn.Sequential(volume_convolution(12, 16, 2), volume_convolution(16, 16))
        self.up_middle = volume_convolution(28, 12)
        self.up_top = volume_convolution(20, 8)
        self.head = nn.Conv3d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, D, H, W) -> scores of the same shape; positive inside the ball."""
        top = self.top(x)
        middle = self.middle(top)
        joined = torch.cat([middle, _doubled(self.bottom(middle))], dim=1)
        joined = torch.cat([top, _doubled(self.up_middle(joined))], dim=1)
        scores: Tensor = self.head(self.up_top(joined))
        return scores


class Perceptron(nn.Module):
    """Four hidden layers on a table."""

    def __init__(self) -> None:
        super().__init__()
        widths = (30, 48, 32, 32, 24)
        self.units = nn.Sequential(*(linear(*pair) for pair in itertools.pairwise(widths)))
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 30) -> class scores (N, 2)."""
        scores: Tensor = self.head(self.units(x))
        return scores


class Siamese(nn.Module):
    """The same trunk sees both images of a pair, one call each; five BN layers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            convolution(1, 16), convolution(16, 24, 2), convolution(24, 24), convolution(24, 32, 2)
        )
        self.embedding = linear(32, 32)
        self.head = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2, 1, 8, 8) -> score (N,); positive where both show the same class."""
        one, other = (self.embedding(self.trunk(image).mean((2, 3))) for image in x.unbind(1))
        score: Tensor = self.head((one - other).abs())
        return score.squeeze(1)


class Audio(nn.Module):
    """Four convolutions along time."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(
            signal_convolution(8, 24),
            signal_convolution(24, 24),
            signal_convolution(24, 32),
            signal_convolution(32, 32),
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 8, T) -> class scores (N, 10)."""
        scores: Tensor = self.head(self.units(x).mean(2))
        return scores


class Points(nn.Module):
    """The same layers on every point, the largest value of every channel, and a hidden layer on the cloud."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(point_convolution(2, 16), point_convolution(16, 24), point_convolution(24, 32))
        self.cloud = linear(32, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2, P) -> class scores (N, 5)."""
        scores: Tensor = self.head(self.cloud(self.units(x).amax(2)))
        return scores


class Mixer(nn.Module):
    """Patches of 2x2 pixels, mixed by turns over positions and, as rows of one table, over channels."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embedding = linear(4, width)
        self.positions = nn.ModuleList(nn.Linear(16, 16) for _ in range(depth))
        self.units = nn.ModuleList(linear(width, width) for _ in range(depth))
        self.head = nn.Linear(16 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 8, 8) -> class scores (N, 10)."""
        tokens = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
        shape = (*tokens.shape[:2], -1)
        tokens = self.embedding(tokens.flatten(0, 1)).view(shape)
        for mix, unit in zip(self.positions, self.units, strict=True):
            tokens = tokens + mix(tokens.transpose(1, 2)).transpose(1, 2)
            tokens = tokens + unit(tokens.flatten(0, 1)).view(shape)
        scores: Tensor = self.head(tokens.flatten(1))
        return scores


class Generator(nn.Module):
    """From a code to an image, by transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.seed = linear(16, 96)
        self.units = nn.Sequential(transposed_convolution(24, 24), transposed_convolution(24, 16))
        self.head = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 16) -> images (N, 1, 8, 8)."""
        image: Tensor = self.head(self.units(self.seed(x).unflatten(1, (24, 2, 2))))
        return image


def convolution(inputs: int, outputs: int, stride: int = 1) -> Unit:
    """3x3 on images."""
    return Unit(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))


def pre_convolution(inputs: int, outputs: int) -> PreUnit:
    """3x3 on images, after the normalization."""
    return PreUnit(nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(inputs))


def volume_convolution(inputs: int, outputs: int, stride: int = 1) -> Unit:
    """3x3x3 on volumes."""
    return Unit(nn.Conv3d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm3d(outputs))


def signal_convolution(inputs: int, outputs: int) -> Unit:
    """Of 3 steps, on signals."""
    return Unit(nn.Conv1d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm1d(outputs))


def point_convolution(inputs: int, outputs: int) -> Unit:
    """On every point."""
    return Unit(nn.Conv1d(inputs, outputs, 1, bias=False), nn.BatchNorm1d(outputs))


def transposed_convolution(inputs: int, outputs: int) -> Unit:
    """4x4 on images, which it makes twice as large."""
    return Unit(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1, bias=False), nn.BatchNorm2d(outputs))


def linear(inputs: int, outputs: int) -> Unit:
    """On rows of a table."""
    return Unit(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs))


def _doubled(x: Tensor) -> Tensor:
    return nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "dense": Dense,
    "unet3d": UNet3d,
    "mlp": Perceptron,
    "siamese": Siamese,
    "audio": Audio,
    "points": Points,
    "mixer": Mixer,
    "generator": Generator,
}

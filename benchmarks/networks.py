"""ResNet-18 and ResNet-50 (He et al. 2016, arXiv 1512.03385, table 1) in plain torch, with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

CLASSES = 1000


class _Block(nn.Module):
    """A residual block: ``body`` beside the identity, or a 1x1 convolution where the shape changes."""

    def __init__(self, body: nn.Sequential, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(*_convolution(channels, out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Stem, four stages, global average pooling and a linear classifier.

    Args:
        block: Makes a block of (channels in, width, stride).
        blocks: Blocks of each stage.
        expansion: Channels out of a block over its width.
    """

    def __init__(self, block: Callable[[int, int, int], nn.Module], blocks: tuple[int, ...], expansion: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_convolution(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        stages, channels = [], 64
        for index, depth in enumerate(blocks):
            width = 64 * 2**index
            layers = []
            for position in range(depth):
                layers.append(block(channels, width, 2 if index and not position else 1))
                channels = width * expansion
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return scores


def resnet18() -> ResNet:
    """20 BN layers, 11.7 million parameters."""
    return ResNet(_basic, (2, 2, 2, 2), 1)


def resnet50() -> ResNet:
    """53 BN layers, 25.6 million parameters."""
    return ResNet(_bottleneck, (3, 4, 6, 3), 4)


NETWORKS: dict[str, Callable[[], ResNet]] = {"resnet18": resnet18, "resnet50": resnet50}


def settled(name: str, image_size: int, device: torch.device) -> nn.Module:
    """A network in eval mode, with running statistics of random images so that nothing overflows."""
    torch.manual_seed(0)
    model = NETWORKS[name]().to(device)
    return settled_on(model, (torch.randn(8, 3, image_size, image_size, device=device) for _ in range(2)))


@torch.no_grad()
def settled_on(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """The model itself, in eval mode, with the running statistics of these batches."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    for batch in batches:
        model.train()(batch)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def _basic(channels: int, width: int, stride: int) -> nn.Module:
    body = nn.Sequential(*_convolution(channels, width, 3, stride), nn.ReLU(), *_convolution(width, width, 3, 1))
    return _Block(body, channels, width, stride)


def _bottleneck(channels: int, width: int, stride: int) -> nn.Module:
    squeeze = [*_convolution(channels, width, 1, 1), nn.ReLU(), *_convolution(width, width, 3, stride), nn.ReLU()]
    body = nn.Sequential(*squeeze, *_convolution(width, 4 * width, 1, 1))
    return _Block(body, channels, 4 * width, stride)


def _convolution(channels: int, out: int, kernel: int, stride: int) -> tuple[nn.Module, nn.Module]:
    convolution = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    return convolution, nn.BatchNorm2d(out)

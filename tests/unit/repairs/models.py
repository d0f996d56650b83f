"""Models with norm layers that surgery could spoil."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.config.targets import TARGETS
from support.networks import unsettled

EVERY = tuple(name for name in TARGETS.names() if name != "cross-iteration")
"""The targets of any layer. The layers of the one left out need a convolution before them: test_cross_iteration.py."""
DEPLOYING = [name for name in EVERY if TARGETS[name].deploys]


class BatchNormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: normalizes, then drops, then activates, both being child modules."""

    def __init__(self, channels: int, drop: float = 0.0, **options: Any) -> None:
        super().__init__(channels, **options)
        self.drop = nn.Dropout2d(drop) if drop else nn.Identity()
        self.act = nn.PReLU(channels)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class BatchNormRelu(nn.BatchNorm2d):
    """The activation is no child module: nothing could carry it over."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Swapped(BatchNormAct):
    """Applies its children in another order than they were registered."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, self.act(input))


class OtherwiseInTraining(nn.BatchNorm2d):
    """BN at inference alone."""

    def forward(self, input: Tensor) -> Tensor:
        return input if self.training else super().forward(input)


class SyncBatchNormAct(nn.SyncBatchNorm):
    """As timm's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


class Choosy(nn.BatchNorm2d):
    """Takes no input but that of its own network."""

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1] != 224:
            raise ValueError("not an image of 224")
        return super().forward(input)


class Pooling(nn.BatchNorm2d):
    """Its output has another shape."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).mean((2, 3))


class NeverTraining(nn.BatchNorm2d):
    """Stays in eval mode: converted to what trains, it would begin to."""

    def train(self, mode: bool = True) -> NeverTraining:
        return super().train(False)


class Renamed(nn.BatchNorm2d):
    """Only a name of its own, and a child that it does not use."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.unused = nn.ReLU()


class Branches(nn.Module):
    """One norm under two names, in a Sequential, a list, a dictionary, a tuple and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)
        self.again = self.bn
        self.path = nn.Sequential(nn.Conv2d(4, 4, 1), self.bn, nn.ReLU())
        self.listed = nn.ModuleList([nn.BatchNorm2d(4), self.bn])
        self.keyed = nn.ModuleDict({"first": nn.BatchNorm2d(4)})
        self.in_list: list[Any] = [self.bn, "text", {"deep": (self.listed[0],)}]
        self.__dict__["unregistered"] = self.bn
        self.method = self.bn.forward

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.bn(self.conv(x)))
        x = self.listed[0](self.path(x)) + self.unregistered(x)
        return self.keyed["first"](self.in_list[0](x)).mean((2, 3))


class Activated(nn.Module):
    """A stem with an activation inside its norm."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = BatchNormAct(4, drop)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bn(self.conv(x))).mean((2, 3))


def prepared(model: nn.Module) -> nn.Module:
    """With running statistics that fit nothing, and no two activations alike."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.6)
    return unsettled(model)


def images(*shape: int) -> Tensor:
    """A batch, the same every time."""
    return torch.randn(*(shape or (4, 3, 6, 6)), generator=torch.Generator().manual_seed(3))

"""The layers that are asked: those of ``bnprobe.nn`` in their variants, and BN beside them as the control."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

import bnprobe.nn as layers

CHANNELS = 4
_SPACE = {1: (7,), 2: (6, 5), 3: (4, 3, 5)}
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Subject:
    """A kind of layer with its settings.

    Attributes:
        name: As the tables show it.
        kind: The class.
        dimensions: Of space: 1, 2 or 3.
        family: "bn", "renorm", "frozen", "gated", "ghost", "instance", "weighed", "average", "domain" or "following".
        settings: Keyword arguments of the class.
    """

    name: str
    kind: Callable[..., nn.Module]
    dimensions: int
    family: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def is_lazy(self) -> bool:
        """Whether the layer learns its number of channels from its first input."""
        return isinstance(self.kind, type) and issubclass(self.kind, LazyModuleMixin)

    @property
    def has_ghosts(self) -> bool:
        """Whether a batch is normalized in parts."""
        return "virtual_batch_size" in self.settings

    @property
    def modes(self) -> tuple[bool, ...]:
        """The values of ``training`` with which something may look into the layer: a transform, script or compiler."""
        return (False,) if self.family == "average" else (True, False)

    def new(self, channels: int = CHANNELS, *others: Any, **settings: Any) -> nn.Module:
        """A layer as its class makes it; a lazy one knows its channels already."""
        settings = {**self.settings, **settings}
        if not self.is_lazy:
            return self.kind(channels, *others, **settings)
        names = ("eps", "momentum", "affine")
        made = self.kind(**dict(zip(names, others, strict=False)), **settings)
        if made.running_mean.device.type != "meta":
            made.eval()(torch.zeros(2, channels, *_SPACE[self.dimensions], dtype=made.running_mean.dtype))
        return made.train()

    def layer(self, training: bool = True, **settings: Any) -> nn.Module:
        """A layer that has been used: parameters and statistics are not those of a new one."""
        made = self.new(**settings)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name in ("weight", "bias", "running_mean", "renorm_mean"):
                if (values := getattr(made, name, None)) is not None:
                    values.add_(torch.randn(values.shape, generator=generator).to(values), alpha=0.3)
            for name in ("running_var", "renorm_var"):
                if (values := getattr(made, name, None)) is not None:
                    values.add_(torch.rand(values.shape, generator=generator).to(values), alpha=0.5)
        return made.train(training)

    def differentiable(self, training: bool) -> nn.Module:
        """A float64 layer whose training is differentiable as a whole, for finite differences.

        r and d are constants for the gradient by definition, so that a difference would move them. Limits of 1 and 0,
        a window of one batch, or instance norm alone leave none. The statistics do not move.
        """
        limits = {"r_max": 1.0, "d_max": 0.0}
        settings: dict[str, Any] = {}
        if self.family in ("renorm", "average"):
            settings = {**limits, **({"window": 1} if self.family == "average" else {"r_min": None})}
        if self.family == "instance" and training:
            settings = {"blend": 1.0}
        layer = self.layer(training, **settings).double()
        layer.track_running_stats = False
        return layer

    def net(self, training: bool = True, **settings: Any) -> nn.Sequential:
        """A convolution of ``CHANNELS`` channels, the layer, and a ReLU."""
        generator = torch.Generator().manual_seed(6)
        convolution = _CONVOLUTIONS[self.dimensions](CHANNELS, CHANNELS, 3, padding=1)
        with torch.no_grad():
            for values in convolution.parameters():
                values.copy_(torch.randn(values.shape, generator=generator) * 0.3)
        layer = self.layer(training, **settings)
        if isinstance(layer, layers.CrossIterationBatchNorm):
            layer.follow(convolution)
        return nn.Sequential(convolution, layer, nn.ReLU()).train(training)

    def batch(self, count: int = 4, seed: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        """An input with a mean and a spread, of shape (count, CHANNELS, *space)."""
        shape = (count, CHANNELS, *_SPACE[self.dimensions])
        values = 0.5 + 1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return values if dtype is None else values.to(dtype)

    def plain(self, *arguments: Any, **settings: Any) -> nn.Module:
        """BN of the same dimensions."""
        return _PLAIN[self.dimensions](*arguments or (CHANNELS,), **settings)

    @property
    def plain_kind(self) -> type[nn.Module]:
        """The class of ``plain``."""
        return _PLAIN[self.dimensions]


def subjects() -> tuple[Subject, ...]:
    """The controls, then every layer of ``bnprobe.nn``."""
    controls = [Subject(f"nn.{kind.__name__}", kind, space, "bn") for space, kind in _PLAIN.items()]
    controls.append(Subject("nn.LazyBatchNorm2d", nn.LazyBatchNorm2d, 2, "bn"))
    families = {
        "BatchRenorm": "renorm", "LazyBatchRenorm": "renorm", "FrozenBatchNorm": "frozen", "GatedBatchNorm": "gated",
        "GhostBatchNorm": "ghost", "InstanceRenorm": "instance", "ExampleWeighedBatchNorm": "weighed",
        "MovingAverageBatchNorm": "average", "DomainBatchNorm": "domain", "CrossIterationBatchNorm": "following",
    }  # fmt: skip
    settings = {"domain": {"default_domain": 0}, "ghost": {"virtual_batch_size": 2}}
    own = [
        Subject(name, getattr(layers, name), space, family, settings.get(family, {}))
        for prefix, family in families.items()
        for space in (1, 2, 3)
        for name in (f"{prefix}{space}d",)
    ]
    return (*controls, *own, *_variants())


def _variants() -> tuple[Subject, ...]:
    """Layers with the options that take another path."""
    renorm = layers.BatchRenorm2d
    return (
        Subject("SyncBatchRenorm", layers.SyncBatchRenorm, 2, "renorm"),
        Subject("BatchRenorm2d, cumulative average", renorm, 2, "renorm", {"momentum": None}),
        Subject('BatchRenorm2d, running="std"', renorm, 2, "renorm", {"running": "std"}),
        Subject("BatchRenorm2d, as in Keras", renorm, 2, "renorm", {"renorm_momentum": 0.1, "r_min": 0.5}),
        Subject("BatchRenorm2d, ghost batches", renorm, 2, "renorm", {"virtual_batch_size": 2}),
        Subject("InstanceRenorm2d, blend 0", layers.InstanceRenorm2d, 2, "instance", {"blend": 0.0}),
    )


SUBJECTS = subjects()


def control_of(subject: Subject) -> Subject:
    """BN of the same dimensions, as a subject."""
    return next(each for each in SUBJECTS if each.family == "bn" and each.dimensions == subject.dimensions)

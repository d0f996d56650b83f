"""Cost of Batch Renorm relative to plain BN, forward and backward, also for other implementations.

The shapes are those of the BN layers of ResNet-18 and ResNet-50 at 224x224. Every layer gets the same input and the
same gradient; the others are:

* naive: the paper's formula in plain operations, differentiated by autograd;
* sb3-contrib: accepts only (rows, channels), so positions are passed as rows;
* torchrl: accepts any number of dimensions.

All of them renormalize from the first step. One that is not installed is listed as such. Compiled layers need a C++
compiler.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.setting import Setting
from benchmarks.tables import Row, at_least, at_most
from benchmarks.timing import Rounds, interleave
from bnprobe.nn import BatchRenorm2d

_SHAPES = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
"""Channels, and height and width."""

_BATCH_SIZES = (2, 32)
_RIVAL_CELLS = tuple(
    (size, shape) for size in _BATCH_SIZES for shape in _SHAPES if size * shape[0] * shape[1] ** 2 < 8e6
)
"""(batch size, shape) at which the others are timed too; at the largest shapes they need seconds and gigabytes."""
_COMPILED_SHAPES = ((64, 56), (128, 28), (512, 7))
_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_SECONDS = 0.01
"""Seconds that plain BN should take in a timed run, which repeats its step accordingly."""

_PLAIN, _OURS = "nn.BatchNorm2d", "bnprobe"
_BOTH = f"{_OURS} / {_PLAIN}"


class NaiveRenorm(nn.BatchNorm2d):
    """Algorithm 1 of Ioffe 2017, written out literally."""

    def forward(self, x: Tensor) -> Tensor:
        axes, shape = (0, 2, 3), (1, -1, 1, 1)
        mean, variance = x.mean(axes), x.var(axes, correction=0)
        deviation, running = (variance + self.eps).sqrt(), (self.running_var + self.eps).sqrt()
        r = (deviation / running).clamp(1 / 3, 3).detach()
        d = ((mean - self.running_mean) / running).clamp(-5, 5).detach()
        xhat = (x - mean.view(shape)) / deviation.view(shape) * r.view(shape) + d.view(shape)
        with torch.no_grad():
            count = x.numel() // x.shape[1]
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_var += self.momentum * (variance * count / (count - 1) - self.running_var)
        return xhat * self.weight.view(shape) + self.bias.view(shape)


def rows(setting: Setting) -> list[Row]:
    """Geometric mean of the ratios over all shapes, with the smallest and the largest ratio."""
    found = []
    for layout in _FORMATS:
        cells = {size: [_Cell(setting, size, shape, layout) for shape in _SHAPES] for size in _BATCH_SIZES}
        beside = {size: [cell.measure([_PLAIN, _OURS]) for cell in part] for size, part in cells.items()}
        what = f"{layout}, {_BOTH}, batch sizes {' and '.join(map(str, _BATCH_SIZES))}"
        found.append(_cost(what, [rounds for part in beside.values() for rounds in part], goal=1.0))
        found += [_cost(f"{layout}, the same, batch size {size}", part, None) for size, part in beside.items()]
    found.append(_compiled(setting))
    rivals = [name for name in ("naive", *_RIVALS) if name == "naive" or _version(name)]
    against = [_Cell(setting, size, shape, "contiguous").measure([_OURS, *rivals]) for size, shape in _RIVAL_CELLS]
    found += [_speedup(f"contiguous, {_named(name)} / {_OURS}", name, against) for name in rivals]
    return [*found, *(Row(name, "is not installed") for name in _RIVALS if not _version(name))]


def _cost(what: str, measured: list[Rounds], goal: float | None) -> Row:
    ratios = [rounds.ratio(_OURS, _PLAIN) for rounds in measured]
    detail = f"by shape {min(ratios):.2f} to {max(ratios):.2f}"
    return at_most(what, _geometric_mean(ratios), goal, detail)


def _compiled(setting: Setting) -> Row:
    what = f"both formats, compiled: {_BOTH}"
    if setting.device.type == "cpu" and shutil.which("g++") is None:
        return Row(what, "cannot be compiled here: there is no g++")
    cells = [_Cell(setting, *cell) for cell in itertools.product(_BATCH_SIZES, _COMPILED_SHAPES, _FORMATS)]
    return _cost(what, [cell.measure([_PLAIN, _OURS], compiled=True) for cell in cells], goal=1.0)


def _speedup(what: str, name: str, measured: list[Rounds]) -> Row:
    ratios = [rounds.ratio(name, _OURS) for rounds in measured]
    return at_least(what, _geometric_mean(ratios), 3.0, f"by shape {min(ratios):.2f} to {max(ratios):.2f}")


@dataclass(frozen=True)
class _Cell:
    setting: Setting
    batch_size: int
    shape: tuple[int, int]
    layout: str

    def measure(self, names: list[str], compiled: bool = False) -> Rounds:
        """Time forward and backward of these layers, interleaved."""
        torch.compiler.reset()
        channels, side = self.shape
        device = self.setting.device
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.batch_size, channels, side, side, generator=generator)
        x = x.to(device, memory_format=_FORMATS[self.layout]).requires_grad_()
        gradient = torch.randn_like(x)
        layers = {name: _LAYERS[name](channels).to(device) for name in names}
        if compiled:
            layers = {name: torch.compile(layer, fullgraph=True) for name, layer in layers.items()}
        steps = {name: _step(layer, x, gradient) for name, layer in layers.items()}
        once = interleave({names[0]: steps[names[0]]}, 3, device).median(names[0])
        repeats = max(1, math.ceil(_SECONDS / once))
        repeated = {name: _repeated(step, repeats) for name, step in steps.items()}
        return interleave(repeated, self.setting.rounds, device)


def _step(layer: nn.Module, x: Tensor, gradient: Tensor) -> Callable[[], object]:
    leaves = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), leaves, gradient)


def _repeated(step: Callable[[], object], times: int) -> Callable[[], object]:
    return lambda: [step() for _ in range(times)][-1]


def _sb3_contrib(channels: int) -> nn.Module:
    from sb3_contrib.common.torch_layers import BatchRenorm1d

    class Rows(BatchRenorm1d):
        """Positions as rows."""

        def forward(self, x: Tensor) -> Tensor:
            rows = super().forward(x.movedim(1, -1).reshape(-1, x.shape[1]))
            return rows.reshape(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)

    return Rows(channels, warmup_steps=0)


def _torchrl(channels: int) -> nn.Module:
    from torchrl.modules import BatchRenorm1d

    return BatchRenorm1d(channels, warmup_steps=0)


_RIVALS: dict[str, Callable[[int], nn.Module]] = {"sb3-contrib": _sb3_contrib, "torchrl": _torchrl}
_LAYERS = {_PLAIN: nn.BatchNorm2d, _OURS: BatchRenorm2d, "naive": NaiveRenorm, **_RIVALS}


def _named(name: str) -> str:
    return f"{name} {_version(name)}" if name in _RIVALS else name


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))

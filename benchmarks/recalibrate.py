"""``recalibrate --path eval`` beside the plain forward pass of the same images: all at once, and layer by layer.

Passes are counted by the multiplications of convolutions, which do not depend on the machine. What is beyond one is the
self-check and the two passes in which layers are found, a fixed number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnprobe
from benchmarks.contenders import plain
from benchmarks.setting import Setting
from benchmarks.tables import Row, at_most
from benchmarks.timing import interleave
from bnprobe.measure import population

GOAL = 1.3
"""Passes."""


def rows(setting: Setting) -> list[Row]:
    """Passes and time of each network, with and without the memory for all images at once."""
    return [row for name in setting.networks for row in _network(setting, name)]


def _network(setting: Setting, name: str) -> list[Row]:
    model, batches = setting.network(name), setting.micro_batches()
    joined = setting.data().split(32)
    contenders: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(model, joined),
        "at once": lambda: bnprobe.recalibrate(model, batches, path="eval"),
        "layer by layer": lambda: _layer_by_layer(model, batches),
    }
    work = {}
    for each, run in contenders.items():
        with _Multiplications() as counted:
            run()
        work[each] = counted.found
    rounds = interleave(contenders, setting.rounds, setting.device, processor=True)
    found = []
    for each, goal in (("at once", GOAL), ("layer by layer", None)):
        what = f"{name}, recalibrate --path eval of {setting.images} images, {each}: passes"
        detail = f"in time {rounds.ratio(each, 'plain'):.2f} x the plain forward pass, {rounds.median(each):.2f} s"
        found.append(at_most(what, work[each] / work["plain"], goal, detail))
    return found


def _layer_by_layer(model: nn.Module, batches: list[Tensor]) -> None:
    with _no_room():
        bnprobe.recalibrate(model, batches, path="eval")


@contextmanager
def _no_room() -> Iterator[None]:
    """As on data that does not fit into memory at once."""
    before, population.LARGEST = population.LARGEST, 0
    try:
        yield
    finally:
        population.LARGEST = before


class _Multiplications(TorchDispatchMode):
    """Counts the multiplications of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default:
            self.found += output.numel() * args[1][0].numel()
        return output

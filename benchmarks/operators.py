"""What a scan dispatches beside a plain forward pass: counts, which do not depend on the machine."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders import Probe
from benchmarks.setting import BATCH_SIZE, Setting
from benchmarks.tables import Row, at_most
from bnprobe.measure.session import PathName

GOAL = 4.0

_STEPS = 12
"""Physical batches beyond the first: the sums of several are taken at once."""

_WAITS = ("aten._local_scalar_dense.default", "aten.item.default", "aten.nonzero.default")
"""Operators that wait for the device."""

_LOOK = "tolist"
"""The host reads a whole tensor, which is not dispatched: on a device it would wait."""


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def rows(setting: Setting) -> list[Row]:
    """For each path the operators that a further physical batch takes, and the waits among them."""
    return [row for name in setting.networks for path in ("train", "eval") for row in _path(setting, name, path)]


def _path(setting: Setting, name: str, path: PathName) -> list[Row]:
    model, physical = setting.network(name), min(32, setting.images)
    step = setting.micro_batches()[: physical // BATCH_SIZE]
    once, often = (_counted(Probe(model, step * number, physical), path) for number in (1, 1 + _STEPS))
    plain = sum(_plain(model, torch.cat(step), path == "train").values())
    further = often - once
    looks = further.pop(_LOOK, 0) / _STEPS
    added, waits = further.total() / _STEPS, sum(further[each] for each in _WAITS) / _STEPS
    on_cpu = setting.device.type == "cpu"  # where the host waits for nobody
    return [
        at_most(
            f"{name}, {path} path: operators of a step / of a forward pass in {path} mode",
            added / plain,
            GOAL,
            f"{added:.0f} / {plain}",
        ),
        Row(
            f"{name}, {path} path: waits for the device in a step",
            f"{waits:g}, looks of the host: {looks:g}",
            "0",
            waits == 0 and (on_cpu or looks == 0),
        ),
    ]


def _counted(probe: Probe, path: PathName) -> Counter[str]:
    probe.run(path)  # what is found once
    tolist, looks = torch.Tensor.tolist, Counter[str]()

    def looked(tensor: Tensor) -> Any:
        looks[_LOOK] += 1
        return tolist(tensor)

    with _Counting() as counting, patch.object(torch.Tensor, "tolist", looked):
        probe.run(path)
    return counting.counts + looks


@torch.no_grad()
def _plain(model: nn.Module, x: Tensor, training: bool) -> Counter[str]:
    momenta = {norm: norm.momentum for norm in model.modules() if isinstance(norm, nn.BatchNorm2d)}
    for norm in momenta:
        norm.momentum = 0.0  # the running statistics stay
    with _Counting() as counting:
        model.train(training)(x)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    model.eval()
    return counting.counts

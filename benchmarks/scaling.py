"""How the time of a whole scan grows with layers, channels, images, batch size and processes."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.networks import settled_on
from benchmarks.setting import Setting
from benchmarks.tables import Row
from benchmarks.timing import interleave
from bnprobe.commands.scan import scan

GOAL = 1.1
"""Exponent of the growth between the two largest sizes; 1 is linear, and more by no more than the noise."""

PROCESSES_GOAL = 1.8
"""Speed-up by a second process, each with a thread of its own."""

_LAYERS = (10, 50, 250, 1000, 2000)
_CHANNELS = (16, 64, 256, 1024)
_IMAGES = (64, 256, 1024, 4096)
_BATCH_SIZES = (1, 2, 8, 32)
_QUICK = 3
"""Sizes that --quick takes of each."""


class _Chain(nn.Module):
    """Convolutions in a row, each with its BN layer and ReLU."""

    def __init__(self, layers: int, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, channels, 1)
        blocks = (
            nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU()) for _ in range(layers)
        )
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.blocks(self.stem(x)).mean((2, 3))
        return found


def _chain(layers: int, channels: int, device: torch.device) -> nn.Module:
    return settled_on(_Chain(layers, channels).to(device), [torch.randn(64, 3, 8, 8, device=device)])


def rows(setting: Setting) -> list[Row]:
    """A row for each axis: seconds by size, and the exponent between the two largest."""
    most = _QUICK if setting.rounds <= _QUICK else None
    device, images = setting.device, 32
    axes: Mapping[str, Mapping[int, Callable[[], object]]] = {
        "layers": {n: partial(_scan, _chain(n, 8, device), images, 2) for n in _LAYERS[:most]},
        "channels": {n: partial(_scan, _chain(10, n, device), images, 2) for n in _CHANNELS[:most]},
        "images": {n: partial(_scan, _chain(10, 64, device), n, 2) for n in _IMAGES[:most]},
        "batch size": {n: partial(_scan, _chain(10, 64, device), 256, n) for n in _BATCH_SIZES[:most]},
    }
    found = [_row(setting, axis, contenders) for axis, contenders in axes.items()]
    return [*found, _processes(setting)] if device.type == "cpu" else found


def _scan(model: nn.Module, images: int, batch_size: int) -> object:
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(images // batch_size, batch_size, 3, 8, 8, generator=generator)
    device = next(model.parameters()).device
    return scan(model, list(batches), batch_size, num_batches=len(batches), device=str(device))


def _row(setting: Setting, axis: str, contenders: Mapping[int, Callable[[], object]]) -> Row:
    rounds = interleave({str(n): run for n, run in contenders.items()}, min(setting.rounds, 3), setting.device)
    seconds = {n: rounds.median(str(n)) for n in contenders}
    *_, (less, before), (more, after) = seconds.items()
    exponent = math.log(after / before) / math.log(more / less)
    curve = ", ".join(f"{n}: {value:.2f} s" for n, value in seconds.items())
    return Row(f"whole scan by {axis}", f"exponent {exponent:.2f} ({curve})", f"at most {GOAL:g}", exponent <= GOAL)


_MODEL = """
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.networks import settled


def load_model():
    return settled("resnet18", 64, torch.device("cpu"))


def load_data(batch_size):
    return DataLoader(TensorDataset(torch.randn(1024, 3, 64, 64)), batch_size)
"""


def _processes(setting: Setting) -> Row:
    """Seconds of the scan of a compute-bound model in one process and in two, with one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.py").write_text(_MODEL)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(min(setting.rounds, 3)):
            for processes, found in seconds.items():
                found.append(_launched(Path(folder), processes))
    one, two = (statistics.median(found) for found in seconds.values())
    return Row(
        "ResNet-18 at 64x64, 1024 images: one process / two",
        f"{one / two:.2f} x ({one:.2f} s / {two:.2f} s)",
        f"at least {PROCESSES_GOAL:g} x",
        one / two >= PROCESSES_GOAL,
    )


def _launched(folder: Path, processes: int) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "bnprobe", "scan", "model.py", "--batch-size", "2", "--batches", "512", "--exit-zero"]
    command += ["--device", "cpu", "--format", "json", "--output", f"{processes}.json", "--force"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    subprocess.run(
        command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    report = json.loads((folder / f"{processes}.json").read_text())
    return float(report["scan"]["seconds"])

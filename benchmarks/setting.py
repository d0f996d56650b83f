"""What all benchmarks share: device, images and networks, and a description of the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.networks import settled

BATCH_SIZE = 2
"""Images per micro-batch, in every benchmark."""

PHYSICAL = {"cpu": (2, 4, 8, 16, 32, 64), "cuda": (32, 64, 128, 256)}
"""Physical batches from which the fastest one for the plain forward pass is chosen."""


@dataclass(frozen=True)
class Setting:
    """Settings of a benchmark run.

    Attributes:
        device: Device to run on.
        networks: Names of the networks.
        images: Images per timed run; a multiple of every physical batch.
        image_size: Height and width of the images.
        rounds: Timed runs of each contender.
    """

    device: torch.device
    networks: tuple[str, ...]
    images: int
    image_size: int
    rounds: int

    def network(self, name: str) -> nn.Module:
        """A network on the device, in eval mode."""
        return settled(name, self.image_size, self.device)

    def data(self) -> Tensor:
        """All images of a timed run, on the device."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.images, 3, self.image_size, self.image_size)
        return torch.randn(shape, generator=generator).to(self.device)

    def micro_batches(self) -> list[Tensor]:
        """The same images in batches of two, as a loader would give them."""
        return [batch.clone() for batch in self.data().split(BATCH_SIZE)]

    @property
    def physical(self) -> tuple[int, ...]:
        """Physical batches to try that divide the number of images."""
        return tuple(size for size in PHYSICAL[self.device.type] if self.images % size == 0)


@dataclass(frozen=True)
class RandomBatches:
    """Batches of two that are made on the fly, so that they need no memory."""

    count: int
    image_size: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(self.count):
            yield torch.randn(BATCH_SIZE, 3, self.image_size, self.image_size, generator=generator)


def devices(asked: str | None) -> list[torch.device]:
    """The requested device; else the CPU, and CUDA if available."""
    if asked is not None:
        return [torch.device(asked)]
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def machine(device: torch.device) -> str:
    """The machine in one line."""
    words = f"{_cpu()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    if device.type == "cuda":
        words = f"{torch.cuda.get_device_name(device)} in {words}"
    return f"{words}, Python {platform.python_version()}"


def load() -> str:
    """The load of the machine, if the system reports it."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

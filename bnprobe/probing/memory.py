"""How many images may run at once."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CPU_IMAGES = 32
CUDA_IMAGES = 256
"""Above these a larger physical batch was not faster; a GPU wants more to be busy."""

_SHARE = 0.25
"""Share of the free memory that one forward pass may be planned to take."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch ran out of memory: its own error on CUDA, a RuntimeError on CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "not enough memory" in str(error)


def plan_images(bytes_per_image: int, device: torch.device) -> int:
    """Images for one physical batch, from the memory that the activations of one image take.

    Args:
        bytes_per_image: Sum of the inputs of all norm layers: an upper bound of what is alive at a time.
        device: Where the model runs.
    """
    free = _free_bytes(device)
    most = CUDA_IMAGES if device.type == "cuda" else CPU_IMAGES
    return max(1, min(most, int(_SHARE * free) // max(bytes_per_image, 1)))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

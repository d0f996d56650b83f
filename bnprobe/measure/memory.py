"""How many samples fit into memory at once, and running fewer when they do not."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from bnprobe.errors import DeviceError, UserCodeError, message_of
from bnprobe.measure.batch import CannotEmulateError
from bnprobe.wording import option

CPU_SAMPLES = 32
CUDA_SAMPLES = 256
"""Above these a larger physical batch was not faster; a GPU wants more to be busy."""

SMALL_SAMPLES = 256
SMALL_BYTES = 2**20
"""A small network takes its time for calls, whatever their samples. On CPU this many samples take a third of the time
of ``CPU_SAMPLES`` at a time (nine layers, 8x8 images), as long as the largest tensor stays this small."""


def less() -> str:
    """What to do where one micro-batch is too large for the memory."""
    return f"Use a smaller {option('--batch-size')}, {option('--autocast')}, or another {option('--device')}."


_SHARE = 0.25
"""Share of the free memory that one forward pass may be planned to take."""

_CPU_TENSOR_BYTES = 2**25
"""Largest tensor of a physical batch on CPU: glibc gives a larger one back to the system at once, and the page faults
of having it anew in every layer cost up to half as much again as the forward pass (ResNet-50, 16 samples or more)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that one sample takes in the inputs of the norm layers.

    Attributes:
        total: Of all layers: an upper bound of what is alive at a time.
        largest: Of the layer with the largest input.
    """

    total: int
    largest: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch ran out of memory: its own error on CUDA, a RuntimeError on CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("not enough memory", "can't allocate memory")  # on Windows, and on Linux
    return isinstance(error, RuntimeError) and any(each in message_of(error) for each in words)


def plan_samples(footprint: Footprint, device: torch.device) -> int:
    """Samples for one physical batch, from what one sample takes.

    On CPU also a power of two at which the largest tensor stays below ``_CPU_TENSOR_BYTES``, but at least one sample
    for every thread.
    """
    most = CUDA_SAMPLES if device.type == "cuda" else CPU_SAMPLES
    fitting = min(most, samples_in_memory(footprint, device))
    if device.type == "cpu":
        samples = max(1, _CPU_TENSOR_BYTES // max(footprint.largest, 1))
        fitting = min(fitting, max(torch.get_num_threads(), 2 ** (samples.bit_length() - 1)))
    return max(1, fitting)


def plan_small(footprint: Footprint, device: torch.device) -> int:
    """As ``plan_samples``, but more samples of a small network: where nothing is kept of each but its scores."""
    usual = plan_samples(footprint, device)
    if footprint.largest == 0:  # not known
        return usual
    return max(usual, min(SMALL_SAMPLES, SMALL_BYTES // footprint.largest, samples_in_memory(footprint, device)))


def fits_in_memory(footprint: Footprint, samples: int, device: torch.device) -> bool:
    """Whether this many samples fit into the memory planned for one forward pass."""
    return samples <= samples_in_memory(footprint, device)


def samples_in_memory(footprint: Footprint, device: torch.device) -> int:
    """Samples that fit into the memory planned for one forward pass."""
    return int(_SHARE * _free_bytes(device)) // max(footprint.total, 1)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


Result = TypeVar("Result")

Refusal = CannotEmulateError | UserCodeError
"""What shows that micro-batches cannot run together."""


@dataclass
class Chunks:
    """Runs micro-batches at once, fewer after every failure.

    Attributes:
        device: Whose memory it is.
        batch_size: Samples in a micro-batch.
        at_once: Micro-batches in a chunk.
    """

    device: torch.device
    batch_size: int
    at_once: int

    def run(
        self,
        micro_batches: Sequence[Any],
        function: Callable[[list[Any]], Result],
        refused: Callable[[Refusal], None] = lambda error: None,
    ) -> list[Result]:
        """Call ``function`` on ``at_once`` consecutive micro-batches at a time, on fewer if these cannot run at once.

        Args:
            micro_batches: All of them.
            function: Changes nothing when it raises.
            refused: Told once when micro-batches cannot run together at all, before they run one by one; if the user's
                code raised, afterwards: none of them raises by itself.

        Raises:
            DeviceError: Not even one micro-batch fits into memory.
            UserCodeError: A micro-batch raised by itself.
        """
        results: list[Result] = []
        done, told = 0, False
        raised: UserCodeError | None = None
        alone = 0  # micro-batches up to this one run one by one to see whether they raise
        while done < len(micro_batches):
            chunk = list(micro_batches[done : done + self.at_once])
            try:
                results.append(function(chunk))
                done += len(chunk)
            except CannotEmulateError as error:
                if told:
                    raise
                refused(error)
                self.at_once, told = 1, True
            except UserCodeError as error:
                if len(chunk) == 1:
                    raise
                raised, alone, self.at_once = error, done + len(chunk), 1
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(len(chunk))
            if raised is not None and done == alone:
                refused(raised)
                raised = None
            # Outside the handlers the failed step's tensors are no longer referenced by the traceback.
        return results

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise DeviceError(
                f"Not even one micro-batch of {self.batch_size} samples fits into the memory of {self.device}. {less()}"
            )
        self.at_once = tried // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

"""Run micro-batches as many at once as the model and the memory allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from bnprobe.errors import DeviceError
from bnprobe.probing.batches import CannotEmulateError
from bnprobe.probing.memory import is_out_of_memory

Result = TypeVar("Result")


@dataclass
class Chunks:
    """How many micro-batches run at once, less after every failure.

    Attributes:
        device: Whose memory it is.
        batch_size: Images in a micro-batch.
        at_once: Micro-batches in a chunk.
    """

    device: torch.device
    batch_size: int
    at_once: int

    def run(
        self,
        micro_batches: Sequence[Any],
        function: Callable[[list[Any]], Result],
        refused: Callable[[CannotEmulateError], None] = lambda error: None,
    ) -> list[Result]:
        """Call ``function`` on so many consecutive micro-batches at a time, on fewer where these cannot run at once.

        Args:
            micro_batches: All of them.
            function: Changes nothing when it raises.
            refused: Told when micro-batches cannot run together at all, before they run one by one.

        Raises:
            DeviceError: Not even one micro-batch fits into memory.
        """
        results: list[Result] = []
        done = 0
        while done < len(micro_batches):
            chunk = list(micro_batches[done : done + self.at_once])
            try:
                results.append(function(chunk))
                done += len(chunk)
            except CannotEmulateError as error:
                if len(chunk) == 1:
                    raise
                refused(error)
                self.at_once = 1
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(len(chunk))
            # Outside the handlers the failed step's tensors are no longer referenced by the traceback.
        return results

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise DeviceError(
                f"Not even one micro-batch of {self.batch_size} images fits into the memory of {self.device}."
                " Use a smaller --batch-size, --autocast, or another --device."
            )
        self.at_once = tried // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

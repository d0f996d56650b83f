"""How often Batch Renorm clips, counted on the device: the host waits only when it reads."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor, nn

from bnprobe.nn.batch_renorm import BatchRenormBase


class ClippingWatch:
    """Counts clipped channels in the training steps of a model's Batch Renorm layers, until it is closed.

    The model must stay on its device meanwhile. As a context manager it closes at the end of the block.

    Args:
        model: A layer that is watched already is watched by this one from now on.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, BatchRenormBase)]
        devices = {_device(layer) for layer in self._layers}
        self._counts = {device: torch.zeros(3, dtype=torch.int64, device=device) for device in devices}
        for layer in self._layers:
            layer.count_clipped(self._counts[_device(layer)])

    def read(self) -> tuple[float, float] | None:
        """Fractions of channels whose r and whose d was clipped, since the last reading; one transfer per device.

        Returns:
            (r, d), each in [0, 1], over all layers, their channels and the steps; None if there was no step.
        """
        total = torch.zeros(3, dtype=torch.int64)
        for counts in self._counts.values():
            total += counts.cpu()
            counts.zero_()
        r, d, channels = total.tolist()
        return (r / channels, d / channels) if channels else None

    def close(self) -> None:
        """Count no more."""
        for layer in self._layers:
            if layer.counts_clipped_into(self._counts[_device(layer)]):
                layer.count_clipped(None)

    def __enter__(self) -> ClippingWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def watch_clipping(model: nn.Module) -> ClippingWatch:
    """Begin to count how many channels of a model's Batch Renorm layers are clipped in training.

    Example:
        with watch_clipping(model) as watch:
            train(...)
            fractions = watch.read()
    """
    return ClippingWatch(model)


def _device(layer: BatchRenormBase) -> torch.device:
    assert isinstance(layer.running_mean, Tensor)  # the statistics are always tracked
    return layer.running_mean.device

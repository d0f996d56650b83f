"""Several processes train one model: joined gradients, and running statistics merged by count."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bnprobe.distributed import World
from bnprobe.errors import UsageError
from bnprobe.probing.batches import tensors_of


class _Joined(DistributedDataParallel):
    """The model as the user's loss sees it: attributes are those of the model itself.

    Buffers are not broadcast: ``BufferSync`` merges them. Parameters may be unused in a step, as in one process.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        places = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():
            # What replaces it in torch 2.13 sends buffers at the start all the same, and is not there in 2.6.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            super().__init__(model, device_ids=places, broadcast_buffers=False, find_unused_parameters=True)
        self.calls = 0

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        self.calls += 1
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "find_unused_parameters=True", UserWarning)
            forward: Callable[..., Any] = super().forward
            return forward(*inputs, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class Replicas:
    """One model in every process, or in one alone.

    Args:
        model: On its device, alike in every process.
        device: That device.
        world: The processes.

    Attributes:
        callee: What to give to the user's loss.
    """

    def __init__(self, model: nn.Module, device: torch.device, world: World) -> None:
        self._world, self._device = world, device
        self._joined = _Joined(model, device) if world.size > 1 else None
        self._buffers = _BufferSync(model, device) if world.size > 1 else None
        self.callee: nn.Module = self._joined or model

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the values that the layers see, while the block runs."""
        with ExitStack() as stack:
            if self._buffers is not None:
                stack.enter_context(self._buffers.counting())
            yield

    def without_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: gradients are joined in the last one of a step."""
        if self._joined is None or last:
            return contextlib.nullcontext()
        return self._joined.no_sync()

    def require_called(self) -> None:
        """Refuse a loss that went past the model's own call, where the gradients of the processes are joined.

        Raises:
            UsageError: The model was not called since this was last asked.
        """
        if self._joined is None:
            return
        if not self._joined.calls:
            raise UsageError(
                "With several processes loss(model, batch) must call the model itself, as model(x): gradients are"
                " joined there. It called parts of the model; let the model's forward() call them."
            )
        self._joined.calls = 0

    def sync_buffers(self) -> None:
        """Give every process the same buffers, merged from all."""
        if self._buffers is not None:
            self._buffers.sync()

    def mean(self, values: list[float]) -> list[float]:
        """Means over the processes, of every value."""
        if self._world.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        distributed.all_reduce(total)
        means: list[float] = (total / self._world.size).tolist()
        return means


class _BufferSync:
    """Makes the buffers of all processes alike after a step.

    Running means and variances are merged as those of one population each (Chan et al. 1983), with the number of
    values seen as weights: variances gain what lies between the means. Counts become the largest one. Other buffers
    become those of the first process.

    Args:
        model: Whose buffers.
        device: Where they are.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._layers = _statistics_of(model)
        self._seen: dict[nn.Module, int] = {}
        self._counters = _counters_of(model)
        ours = [*(each.mean for each in self._layers), *(each.variance for each in self._layers), *self._counters]
        known = {id(buffer) for buffer in ours}
        self._others = [buffer for buffer in model.buffers() if id(buffer) not in known]

    @contextmanager
    def counting(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.layer.register_forward_pre_hook(self._count).remove)
            yield

    def sync(self) -> None:
        with torch.no_grad():
            if self._layers:
                self._merge()
            for counter in self._counters:
                distributed.all_reduce(counter, op=distributed.ReduceOp.MAX)
            for buffer in self._others:
                distributed.broadcast(buffer, src=0)
        self._seen.clear()

    def _count(self, module: nn.Module, inputs: Any) -> None:
        if module.training:
            values = sum(tensor.numel() // tensor.shape[1] for tensor in tensors_of(list(inputs))[:1])
            self._seen[module] = self._seen.get(module, 0) + values

    def _merge(self) -> None:
        """Two sums over the processes: of the means, then of what lies around the merged ones."""
        mean, variance, seen = self._flat()
        weights = _sum(seen)
        known = weights > 0
        share = torch.where(known, seen / weights.clamp_min(1), 0)
        merged = _sum(share * mean)
        spread = _sum(share * (variance + (mean - merged).square()))
        self._store(torch.where(known, merged, mean), torch.where(known, spread, variance))

    def _flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Running means, running variances and values seen, of all channels of all layers, float64."""
        means = torch.cat([each.mean.double() for each in self._layers])
        variances = torch.cat([each.variance.double() for each in self._layers])
        channels = torch.tensor([each.mean.numel() for each in self._layers])
        seen = torch.tensor([self._seen.get(each.layer, 0) for each in self._layers], dtype=torch.float64)
        return means, variances, seen.repeat_interleave(channels).to(self._device)

    def _store(self, means: Tensor, variances: Tensor) -> None:
        sizes = [each.mean.numel() for each in self._layers]
        parts = zip(self._layers, means.split(sizes), variances.split(sizes), strict=True)
        for each, mean, variance in parts:
            each.mean.copy_(mean)
            each.variance.copy_(variance)


@dataclass(frozen=True)
class _Statistics:
    """The running statistics of one layer, shape (channels,)."""

    layer: nn.Module
    mean: Tensor
    variance: Tensor


def _statistics_of(model: nn.Module) -> list[_Statistics]:
    found = []
    for layer in model.modules():
        mean, variance = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            found.append(_Statistics(layer, mean, variance))
    return found


def _counters_of(model: nn.Module) -> list[Tensor]:
    found = [getattr(layer, "num_batches_tracked", None) for layer in model.modules()]
    return [counter for counter in found if isinstance(counter, Tensor)]


def _sum(values: Tensor) -> Tensor:
    total = values.clone()
    distributed.all_reduce(total)
    return total

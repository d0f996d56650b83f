"""Fine-tuning on several processes: DistributedDataParallel, with running statistics merged by their counts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parallel import DistributedDataParallel

from bnprobe.distributed import World, waiting
from bnprobe.errors import UsageError
from bnprobe.measure.batch import tensors_of
from bnprobe.nn.moving_average import MovingAverageBatchNorm
from bnprobe.nn.per_domain import DomainBatchNorm
from bnprobe.nn.plain import parts_of

_Pair = tuple[Tensor, Tensor]
"""Running mean and running variance of a layer."""


class _Joined(DistributedDataParallel):
    """The model as the user's loss sees it: attributes are looked up in the model itself.

    Buffers are not broadcast; ``_BufferSync`` merges them. As in one process, parameters may be unused in a step.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        places = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():
            # Its replacement in torch 2.13 still sends buffers at the start, and does not exist in 2.6.
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
    """One model in every process, or in a single one.

    Args:
        model: The model on its device, identical in every process.
        device: That device.
        world: The processes that train together.

    Attributes:
        callee: The model to pass to the user's loss.
    """

    def __init__(self, model: nn.Module, device: torch.device, world: World) -> None:
        self._world, self._device = world, device
        self._joined = _Joined(model, device) if world.size > 1 else None
        self._buffers = _BufferSync(model, device) if world.size > 1 else None
        self.callee: nn.Module = self._joined or model

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count the values that the layers receive while the block runs."""
        with ExitStack() as stack:
            if self._buffers is not None:
                stack.enter_context(self._buffers.counting())
            yield

    def without_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Context for forward and backward of a micro-batch: gradients are averaged only in the last one of a step."""
        if self._joined is None or last:
            return contextlib.nullcontext()
        return self._joined.no_sync()

    def require_called(self) -> None:
        """Reject a loss that did not call the model itself, where gradients are averaged over processes.

        Raises:
            UsageError: The model was not called since the last check.
        """
        if self._joined is None:
            return
        if not self._joined.calls:
            raise UsageError(
                "With several processes, loss(model, batch) must call the model itself, as in model(x), because"
                " gradients are averaged there. It called only parts of the model: call them in the model's forward()."
            )
        self._joined.calls = 0

    def sync_buffers(self) -> None:
        """Merge the buffers of all processes, and give every process the result."""
        if self._buffers is not None:
            with waiting():
                self._buffers.sync()

    def averaging(self, last: bool) -> AbstractContextManager[None]:
        """Context for the backward pass, which waits for the gradients of other processes in the last of a step."""
        return waiting(self._joined is not None and last)

    def mean(self, values: list[float]) -> list[float]:
        """Mean of every value over the processes."""
        if self._world.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self._device)
        with waiting():
            distributed.all_reduce(total)
        means: list[float] = (total / self._world.size).tolist()
        return means


class _BufferSync:
    """Makes the buffers of all processes identical after a step.

    The result is as if one process had run the k-th calls of a layer in all processes as a single batch. Let a be the
    weight of a batch in the running statistics, n_i the number of values in process i, N their sum, mu_i the batch
    means and s_i^2 the unbiased batch variances. A call updates m, v to (1 - a) m + a mu_i and (1 - a) v + a s_i^2, so
    that a mu_i and a s_i^2 can be computed from the buffers. The values of all processes together have the mean
    mu = sum n_i mu_i / N and the unbiased variance sum((n_i - 1) s_i^2 + n_i (mu_i - mu)^2) / (N - 1) (Chan et al.
    1983), which then enter the running statistics with weight a.

    Buffers that are identical already, as in sync and frozen layers, do not change. Instance norms average the
    variances of samples, so theirs are averaged. So are those of ghost batches: a call that moves the statistics once
    for each of k parts counts as one update with weight 1 - (1 - a)^k, by the mean of the parts. The update weight of
    layers other than BN is unknown: their buffers are treated as statistics of all values they received. The statistics
    of each domain are merged like those of a layer that is called with the samples of that domain alone. Of moving
    average layers the last batches are merged, too; see ``_Window``. Counters become the largest one. All other buffers
    become those of the first process.

    Args:
        model: The model whose buffers are merged.
        device: Device of the buffers.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._device = device
        self._layers = _statistics_of(model)
        self._channels = [each.mean.numel() for each in self._layers]
        self._windows = [_Window(layer) for layer in model.modules() if isinstance(layer, MovingAverageBatchNorm)]
        counters = [getattr(layer, "num_batches_tracked", None) for layer in model.modules()]
        self._counters = [counter for counter in counters if isinstance(counter, Tensor)]
        self._counters += [counter for each in self._windows for counter in each.counters]
        ours = [*(each.mean for each in self._layers), *(each.variance for each in self._layers), *self._counters]
        ours += [getattr(each.layer, name) for each in self._windows for name in each.layer.training_only]
        domains = [layer for layer in model.modules() if isinstance(layer, DomainBatchNorm)]
        ours += [getattr(layer, name) for layer in domains for name in layer.training_only]
        known = {id(buffer) for buffer in ours}
        self._others = [buffer for buffer in model.buffers() if id(buffer) not in known]

    @contextmanager
    def counting(self) -> Iterator[None]:
        with ExitStack() as stack:
            watched: list[_Statistics | _Window] = [*self._layers, *self._windows]
            for each in watched:
                stack.callback(each.layer.register_forward_pre_hook(each.note).remove)
            yield

    def sync(self) -> None:
        with torch.no_grad():
            if self._layers:
                self._merge()
            for window in self._windows:
                window.merge()
            for counter in self._counters:
                distributed.all_reduce(counter, op=distributed.ReduceOp.MAX)
            for buffer in self._others:
                distributed.broadcast(buffer, src=0)
        for each in self._layers:
            each.calls.clear()

    def _merge(self) -> None:
        """Sum over the processes: first values and means, then variances about the merged means."""
        most = int(_largest(torch.tensor(max(len(each.calls) for each in self._layers), device=self._device)))
        found = [each.updates(most) for each in self._layers]
        values, means, variances, own, joins, counted = torch.cat(found, 2).to(self._device).unbind(0)
        count = _sum(values)
        counted = counted + (count > 0).cumsum(0)
        rates = _largest(own)  # processes may have divided their batches into different numbers of parts
        rates = torch.where(counted.isnan(), rates, 1 / counted.clamp_min(1))
        means, variances = (torch.where(own > 0, each * rates / own, 0) for each in (means, variances))
        share = values / count.clamp_min(1)
        merged = _sum(share * means)
        between = values * (means - merged).square() / torch.where(rates > 0, rates, 1)
        pooled = ((values - 1).clamp_min(0) * variances + between) / (count - 1).clamp_min(1)
        pooled, averaged = _sum(torch.stack([pooled, share * variances]))
        spread = torch.where((joins > 0) & (count > 1), pooled, averaged)
        self._store(torch.where(count > 0, rates, 0), merged, spread)
        for each, called in zip(self._layers, (count > 0).sum(0).split(self._channels), strict=True):
            if each.counter is not None:
                each.counter.copy_(each.counted() + called[0])

    def _store(self, rates: Tensor, means: Tensor, variances: Tensor) -> None:
        """Apply the merged updates; shapes (calls, channels of all layers)."""
        now = torch.cat([torch.stack(each.now()) for each in self._layers], 1)
        updated = torch.cat([torch.stack(each.before()) for each in self._layers], 1)
        for rate, mean, variance in zip(rates, means, variances, strict=True):
            updated = (1 - rate) * updated + torch.stack([mean, variance])
        alike = (_largest(now) == -_largest(-now)).all(0)
        merged = torch.where(alike, now, updated)
        for each, part in zip(self._layers, merged.split(self._channels, 1), strict=True):
            each.mean.copy_(part[0])
            each.variance.copy_(part[1])


@dataclass(frozen=True)
class _Statistics:
    """The running statistics of one layer, or of one domain in it, shape (channels,).

    Attributes:
        domain: The domain; None: the statistics are of all values.
        counter: Updates of the domain, shape (); None: the layer counts its batches.
        calls: Calls in train mode since the last merge: values per channel, the statistics before the call, and in how
            many parts the batch was normalized.
    """

    layer: nn.Module
    mean: Tensor
    variance: Tensor
    domain: int | None = None
    counter: Tensor | None = None
    calls: list[tuple[int, _Pair, int]] = field(default_factory=list)

    def now(self) -> _Pair:
        """Current running mean and variance, float64."""
        return self.mean.to(torch.float64, copy=True), self.variance.to(torch.float64, copy=True)

    def before(self) -> _Pair:
        """Running mean and variance before the first call."""
        return self.calls[0][1] if self.calls else self.now()

    def note(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook of the layer; an empty batch is not recorded."""
        size = getattr(module, "virtual_batch_size", None)
        for tensor in tensors_of(list(inputs))[:1] if module.training else ():
            if tensor.numel():
                parts = 1 if size is None else parts_of(tensor.shape[0], size)
                samples, values = tensor.shape[0], tensor.numel() // tensor.shape[1]
                if self.domain is not None:
                    values = values // samples * cast(DomainBatchNorm, module).samples_of(self.domain, tensor)
                self.calls.append((values, self.now(), parts))

    def counted(self) -> int:
        """Updates of the domain before the first call."""
        assert self.counter is not None
        return int(self.counter) - sum(values > 0 for values, _, _ in self.calls)

    def updates(self, most: int) -> Tensor:
        """The updates of the calls, float64 of shape (6, most, channels); 0 for calls that did not happen.

        The six rows: number of values; weight times batch mean; weight times batch variance; weight; whether the
        variance includes the spread between the means, which is so for all but instance norms and ghost batches; and
        for the cumulative average of a domain the updates before, else NaN.
        """
        calls = self.calls
        if calls and not isinstance(self.layer, _BatchNorm):
            calls = [(sum(values for values, _, _ in calls), calls[0][1], 1)]
        found = torch.zeros(6, most, self.mean.numel(), dtype=torch.float64, device=self.mean.device)
        found[3] = torch.tensor(self._rates(most), dtype=torch.float64, device=self.mean.device).unsqueeze(1)
        found[4] = not isinstance(self.layer, _InstanceNorm) and getattr(self.layer, "virtual_batch_size", None) is None
        cumulative = self.counter is not None and cast(DomainBatchNorm, self.layer).momentum is None
        found[5] = self.counted() if cumulative else torch.nan
        after = [*(before for _, before, _ in calls[1:]), self.now()]
        for number, (values, before, _) in enumerate(calls):
            found[0, number] = values
            found[1:3, number] = torch.stack(after[number]) - (1 - found[3, number]) * torch.stack(before)
        return found

    def _rates(self, most: int) -> list[float]:
        """Weights of the batches in the running statistics, in the order of the calls."""
        if not isinstance(self.layer, _BatchNorm):
            return [1.0] * most
        parts = [number for _, _, number in self.calls] + [1] * (most - len(self.calls))
        if self.layer.momentum is not None:
            return [1 - (1 - float(self.layer.momentum)) ** number for number in parts]
        if self.counter is not None:
            present = [values > 0 for values, _, _ in self.calls] + [True] * (most - len(self.calls))
            return [1 / max(1, self.counted() + number) for number in accumulate(present)]
        counted = 0 if self.layer.num_batches_tracked is None else int(self.layer.num_batches_tracked)
        before = counted - sum(number for _, _, number in self.calls)
        return [number / max(1, before + total) for number, total in zip(parts, accumulate(parts), strict=True)]


def _statistics_of(model: nn.Module) -> list[_Statistics]:
    found = []
    for layer in model.modules():
        mean, variance = getattr(layer, "running_mean", None), getattr(layer, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            found.append(_Statistics(layer, mean, variance))
        if isinstance(layer, DomainBatchNorm):
            parts = zip(layer.domain_mean, layer.domain_var, layer.domain_batches, strict=True)
            found += [_Statistics(layer, *part[:2], domain, part[2]) for domain, part in enumerate(parts)]
    return found


class _Window:
    """The last batches of a moving average layer.

    The k-th batches of all processes become one: its mean and biased variance are those of all values. Its gradient
    statistics are averages by the number of values, on the scale of a process, whose gradients are averaged afterwards.

    Args:
        layer: The layer.

    Attributes:
        counters: Numbers of batches and gradients that the layer has seen.
    """

    def __init__(self, layer: MovingAverageBatchNorm) -> None:
        self.layer = layer
        self.counters = layer.batches_seen, layer.gradients_seen
        self._values: list[int] = []
        self._before: list[int] = []

    def note(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook of the layer."""
        for tensor in tensors_of(list(inputs))[:1] if module.training else ():
            if tensor.numel():
                if not self._values:
                    self._before = [int(counter) for counter in self.counters]
                self._values.append(tensor.numel() // tensor.shape[1])

    def merge(self) -> None:
        """Give every process the merged batches."""
        batches, gradients = (self._counts(number) for number in (0, 1))
        layer = self.layer
        mean = _averaged(batches, layer.batch_means)
        spread = layer.batch_vars + (layer.batch_means - mean).square()
        layer.batch_vars.copy_(_averaged(batches, spread, layer.batch_vars))
        layer.batch_means.copy_(mean)
        for ring in (layer.gradient_means, layer.gradient_products):
            ring.copy_(_averaged(gradients, ring))
        self._values.clear()

    def _counts(self, number: int) -> Tensor:
        """Values of this process in the batches since the last merge, float64 of shape (window, 1); 0: not of these."""
        found = torch.zeros(self.layer.window, 1, dtype=torch.float64, device=self.layer.batch_means.device)
        if self._values:
            before = self._before[number]
            for call in range(int(self.counters[number]) - before):
                found[(before + call) % self.layer.window] = self._values[min(call, len(self._values) - 1)]
        return found


def _averaged(weights: Tensor, values: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """The average over the processes, row by row; where no process has a weight, the values stay, or others do.

    Args:
        weights: Shape (rows, 1), float64.
        values, otherwise: Shape (rows, channels).
    """
    total = _sum(torch.cat([weights, weights * values.double()], 1))
    stays = values if otherwise is None else otherwise
    return torch.where(total[:, :1] > 0, (total[:, 1:] / total[:, :1].clamp_min(1)).to(values.dtype), stays)


def _sum(values: Tensor) -> Tensor:
    total = values.clone()
    distributed.all_reduce(total)
    return total


def _largest(values: Tensor) -> Tensor:
    largest = values.clone()
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    return largest

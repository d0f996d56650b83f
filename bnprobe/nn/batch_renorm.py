"""Batch Renormalization layers (Ioffe 2017), which save and deploy as BN."""

from __future__ import annotations

from types import TracebackType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from bnprobe.errors import UsageError
from bnprobe.nn.base import BatchNormLike, in_parts, takes_numbers
from bnprobe.nn.functional import batch_renorm, sync_batch_renorm
from bnprobe.nn.limits import POSITION, Limits, Scheduled
from bnprobe.nn.plain import parts_of, renormalize

_RENORM = ("renorm_mean", "renorm_var")


class BatchRenormBase(Scheduled, BatchNormLike):
    """Base class of the Batch Renorm layers (Ioffe 2017; docs/explanation/batch-renorm.md).

    In training the layer normalizes with the batch statistics, corrected towards the running statistics within limits
    (see ``functional.batch_renorm`` for the formula). At inference it is BN. Parameters and buffers are those of
    ``nn.BatchNorm``, so weights load strictly both ways.

    It departs from the paper in one point: the running variance is an average of unbiased batch variances, as in
    ``nn.BatchNorm``, and not the square of an average of deviations sqrt(var + eps). So the layer deploys as BN of
    PyTorch. With n values per channel, a batch like the running statistics then has r = sqrt(1 - 1/n) instead of 1:
    0.71 for n = 2, 0.98 for n = 32. ``running="std"`` averages as the paper does.

    One value per channel, for which BN raises in training, is allowed: then only the running statistics normalize.
    Under activation checkpointing the running statistics are updated twice per step, as in BN, and the gradients are
    those of the r and d computed the second time.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root; must be positive in training.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Whether there is a weight and a bias per channel.
        r_max, d_max: Limits of the correction; 1 and 0 make the layer BN. Setting one later detaches a schedule.
        device, dtype: Of parameters and buffers.
        bias: Whether an affine layer has a bias.
        r_min: Lower limit of r, as Keras has it; None: 1 / r_max. Under a schedule r also stays above 1 / r_max.
        renorm_momentum: If given, r and d refer to running statistics of their own, with this weight of the new batch,
            as Keras has it: ``renorm_mean`` and ``renorm_var``, which inference does not use.
        running: What is averaged: "variance", unbiased as in BN, or "std", as in the paper.
        virtual_batch_size: If given, a batch is normalized in equal parts of at most so many samples, one after the
            other (ghost batches; Hoffer et al. 2017): each moves the running statistics.

    Attributes:
        running_mean: Shape (channels,).
        running_var: Shape (channels,), unbiased; with ``running="std"`` the square of the averaged sqrt(var + eps),
            less eps.
        schedule: If not None, the limits are read from it at every forward pass. (TorchScript keeps the limits that
            the layer has when it is scripted.)

    Raises:
        UsageError: A limit or another argument is out of range.
    """

    dimensions: ClassVar[tuple[int, int]] = (2, 5)
    """Smallest and largest number of dimensions of an input."""

    training_only: ClassVar[tuple[str, ...]] = (POSITION, *_RENORM)
    """Tensors of the state_dict that inference does not use."""

    __constants__ = [*BatchNormLike.__constants__, "r_min", "r_max", "d_max", "dimensions"]  # noqa: RUF012 (as torch has it)
    __jit_unused_properties__: ClassVar[list[str]] = [
        *BatchNormLike.__jit_unused_properties__,
        *("r_min", "r_max", "d_max", "limits"),
    ]

    @takes_numbers
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        r_min: float | None = None,
        renorm_momentum: float | None = None,
        running: Literal["variance", "std"] = "variance",
        virtual_batch_size: int | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype, bias=bias)
        if r_min is not None and not 0 < r_min <= 1:
            raise UsageError(f"r_min is {r_min}, but must be above 0 and at most 1: r is kept in [r_min, r_max].")
        if renorm_momentum is not None and not 0 < renorm_momentum <= 1:
            raise UsageError(f"renorm_momentum is {renorm_momentum}, but must be above 0 and at most 1.")
        if running not in ("variance", "std"):
            raise UsageError(f'running is {running!r}, but must be "variance" or "std".')
        if virtual_batch_size is not None and virtual_batch_size < 1:
            raise UsageError(f"virtual_batch_size is {virtual_batch_size}, but must be at least 1.")
        self._limits = Limits(r_max, d_max)
        self._r_min = r_min
        self.renorm_momentum = renorm_momentum
        self.running = running
        self.virtual_batch_size = virtual_batch_size
        self._clipped: Tensor | None = None  # where a ClippingWatch counts
        like = self.running_mean if renorm_momentum is not None else None
        self.register_buffer("renorm_mean", None if like is None else torch.zeros_like(like))
        self.register_buffer("renorm_var", None if like is None else torch.ones_like(like))
        self.renorm_mean: Tensor | None
        self.renorm_var: Tensor | None

    @property
    def r_max(self) -> float:
        """r is clipped to [r_min, r_max]."""
        return self.limits.r_max

    @r_max.setter
    def r_max(self, value: float) -> None:
        self._own_limits(value, self.d_max)

    @property
    def r_min(self) -> float:
        """r is clipped to [r_min, r_max]."""
        lowest = 1 / self.r_max
        if self._r_min is None:
            return lowest
        return self._r_min if self.schedule is None else max(self._r_min, lowest)

    @property
    def d_max(self) -> float:
        """d is clipped to [-d_max, d_max]."""
        return self.limits.d_max

    @d_max.setter
    def d_max(self, value: float) -> None:
        self._own_limits(self.r_max, value)

    @property
    def limits(self) -> Limits:
        """The current limits: those of the schedule, if there is one."""
        return self._limits if self.schedule is None else self.schedule

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        mean, variance = (self._buffers.get(name) for name in _RENORM)
        if mean is not None and variance is not None:
            mean.zero_()
            variance.fill_(1)

    def extra_repr(self) -> str:
        more = f", r_max={self.r_max:g}, d_max={self.d_max:g}"
        if self._r_min is not None:
            more += f", r_min={self._r_min:g}"
        if self.renorm_momentum is not None:
            more += f", renorm_momentum={self.renorm_momentum:g}"
        if self.running != "variance":
            more += f", running={self.running!r}"
        if self.virtual_batch_size is not None:
            more += f", virtual_batch_size={self.virtual_batch_size}"
        return super().extra_repr() + more

    def _normalize(self, input: Tensor, mask: Tensor | None) -> Tensor:
        if self.virtual_batch_size is None or not self.training:
            return self._normalize_ghost(input, mask)
        return in_parts(self._normalize_ghost, input, mask, self._ghosts(input))

    def _normalize_ghost(self, input: Tensor, mask: Tensor | None) -> Tensor:
        tensors = (input, *self._statistics(), self.weight, self.bias)
        r_max, d_max = self.limits.read(self.training)
        if not self.training:
            return self._function(*tensors, False, 0.0, self._eps, r_max, d_max)
        own: dict[str, Any] = {}
        if self.renorm_momentum is not None:
            own = {name: getattr(self, name) for name in (*_RENORM, "renorm_momentum")}
        return self._function(
            *tensors, True, self._count_batch(), self._eps, r_max, d_max, self._clipped,
            r_min=self._lowest(r_max), mask=mask, running=self.running, track=self.track_running_stats, **own,
        )  # fmt: skip

    def _lowest(self, r_max: float | Tensor) -> float | Tensor | None:
        """r_min where it is given, a tensor where r_max is one, so that a schedule does not recompile the layer."""
        if self._r_min is None or not isinstance(r_max, Tensor):
            return None if self._r_min is None else self.r_min
        lowest = torch.full_like(r_max, self._r_min)
        return lowest if self.schedule is None else torch.maximum(lowest, 1 / r_max)

    def _function(self, *args: Any, **settings: Any) -> Tensor:
        return batch_renorm(*args, **settings)

    def _scripted(self, input: Tensor, mask: Tensor | None) -> Tensor:
        if not self.training:
            return self._at_inference(input)
        number = self._ghosts(input)
        outputs: list[Tensor] = []
        for i, part in enumerate(torch.tensor_split(input, number)):
            chosen = None if mask is None else torch.tensor_split(mask, number)[i]
            outputs.append(self._scripted_in_training(part, chosen))
        return torch.cat(outputs)

    def _scripted_in_training(self, input: Tensor, mask: Tensor | None) -> Tensor:
        rate = self._count_batch()
        if input.numel() == 0:
            return self._at_inference(input)
        mean, variance = self._statistics()
        renorm_momentum = self.renorm_momentum
        return renormalize(
            input, self.weight, self.bias, mean, variance, self.renorm_mean, self.renorm_var, mask, None, rate,
            0.0 if renorm_momentum is None else renorm_momentum,
            self._eps, self.r_min, self.r_max, self.d_max, self.running == "std", self.track_running_stats,
        )  # fmt: skip

    def _ghosts(self, input: Tensor) -> int:
        """The number of ghost batches in a batch."""
        size = self.virtual_batch_size
        return 1 if size is None else parts_of(input.shape[0], size)

    def _check_input_dim(self, input: Tensor) -> None:
        least, most = self.dimensions
        if least <= input.dim() <= most:
            return
        if least == most:
            raise ValueError(f"expected {least}D input (got {input.dim()}D input)")
        raise ValueError(f"expected {least}D to {most}D input (got {input.dim()}D input)")

    def _own_limits(self, r_max: float, d_max: float) -> None:
        self._limits.r_max, self._limits.d_max = r_max, d_max
        self.schedule = None


class BatchRenorm1d(BatchRenormBase, nn.BatchNorm1d):
    """Batch Renorm for (N, C) or (N, C, L); arguments as for ``BatchRenormBase``."""

    dimensions = (2, 3)


class BatchRenorm2d(BatchRenormBase, nn.BatchNorm2d):
    """Batch Renorm for (N, C, H, W); arguments as for ``BatchRenormBase``."""

    dimensions = (4, 4)


class BatchRenorm3d(BatchRenormBase, nn.BatchNorm3d):
    """Batch Renorm for (N, C, D, H, W); arguments as for ``BatchRenormBase``."""

    dimensions = (5, 5)


class SyncBatchRenorm(BatchRenormBase):
    """Batch Renorm with batch statistics over all processes, on any device; works in a single process too.

    The input has 2 to 5 dimensions.

    Args:
        process_group: Processes that share their statistics; None: all.

    The other arguments are those of ``BatchRenormBase``, without ``virtual_batch_size``.
    """

    already: ClassVar[str] = "sync"

    @takes_numbers
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        r_min: float | None = None,
        renorm_momentum: float | None = None,
        running: Literal["variance", "std"] = "variance",
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, r_max, d_max, device, dtype,
            bias=bias, r_min=r_min, renorm_momentum=renorm_momentum, running=running,
        )  # fmt: skip
        self.process_group = process_group

    def _function(self, *args: Any, **settings: Any) -> Tensor:
        settings["process_group"] = self.process_group
        return sync_batch_renorm(*args, **settings)


class _Lazy(_LazyNormBase):
    """A layer that learns its number of channels from its first input, as ``nn.LazyBatchNorm2d`` does."""

    @takes_numbers
    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        **settings: Any,
    ) -> None:
        # Not the initializer of _LazyNormBase, which gives BN's arguments by position.
        LazyModuleMixin.__init__(self, 0, eps, momentum, False, r_max, d_max, device, dtype, bias=False, **settings)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.affine = affine
        if affine:
            self.weight = UninitializedParameter(**factory)
            if bias:
                self.bias = UninitializedParameter(**factory)
        self.running_mean, self.running_var = UninitializedBuffer(**factory), UninitializedBuffer(**factory)
        for name in _RENORM if self.renorm_momentum is not None else ():
            setattr(self, name, UninitializedBuffer(**factory))

    def initialize_parameters(self, input: Tensor) -> None:
        # Before the others, which may have come with weights of BN.
        for name in _RENORM:
            if isinstance(buffer := getattr(self, name), UninitializedBuffer):
                buffer.materialize((input.shape[1],))
                buffer.fill_(float(name == "renorm_var"))
        super().initialize_parameters(input)


class LazyBatchRenorm1d(_Lazy, BatchRenorm1d):
    """``BatchRenorm1d`` that takes its number of channels from the first input; the other arguments are the same."""

    cls_to_become = BatchRenorm1d


class LazyBatchRenorm2d(_Lazy, BatchRenorm2d):
    """``BatchRenorm2d`` that takes its number of channels from the first input; the other arguments are the same."""

    cls_to_become = BatchRenorm2d


class LazyBatchRenorm3d(_Lazy, BatchRenorm3d):
    """``BatchRenorm3d`` that takes its number of channels from the first input; the other arguments are the same."""

    cls_to_become = BatchRenorm3d


class ClippingWatch:
    """Counts how often a model's Batch Renorm layers clip r and d in training, until it is closed.

    Counting happens on the device; the host waits only in ``read``. The model must stay on its device meanwhile. Used
    as a context manager, the watch closes at the end of the block.

    Args:
        model: Its layers leave any earlier watch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, BatchRenormBase)]
        devices = {_device(layer) for layer in self._layers}
        self._counts = {device: torch.zeros(3, dtype=torch.int64, device=device) for device in devices}
        for layer in self._layers:
            layer._clipped = self._counts[_device(layer)]

    def read(self) -> tuple[float, float] | None:
        """The fractions of clipped r and d since the last call; costs one transfer per device.

        Returns:
            (r, d), each in [0, 1]: averages over layers, channels and training steps. None if there was no step.
        """
        total = torch.zeros(3, dtype=torch.int64)
        for counts in self._counts.values():
            total += counts.cpu()
            counts.zero_()
        r, d, channels = total.tolist()
        return (r / channels, d / channels) if channels else None

    def close(self) -> None:
        """Stop counting."""
        for layer in self._layers:
            if layer._clipped is self._counts[_device(layer)]:  # else a later watch counts
                layer._clipped = None

    def __enter__(self) -> ClippingWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def watch_clipping(model: nn.Module) -> ClippingWatch:
    """Start counting how often a model's Batch Renorm layers clip r and d in training.

    Example:
        with watch_clipping(model) as watch:
            train(...)
            fractions = watch.read()
    """
    return ClippingWatch(model)


def _device(layer: BatchRenormBase) -> torch.device:
    assert isinstance(layer.running_mean, Tensor)  # the statistics are always tracked
    return layer.running_mean.device

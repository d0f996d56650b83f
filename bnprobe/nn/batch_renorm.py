"""Batch Renormalization layers (Ioffe 2017), which save and deploy as BN, and the schedule of their limits."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.errors import StateError, UsageError
from bnprobe.nn.functional import batch_renorm, sync_batch_renorm
from bnprobe.nn.kernels import snapshot


class Limits:
    """r_max and d_max, which may change between steps (internal: set them on the layer or use a schedule).

    A compiled layer reads the tensors, since a changed Python number would recompile it at every step of a schedule.

    Attributes:
        r_max_tensor, d_max_tensor: The limits as float64 tensors of shape () on the CPU.

    Raises:
        UsageError: r_max is below 1 or d_max below 0, or one of them is not finite.
    """

    def __init__(self, r_max: float, d_max: float) -> None:
        self.r_max_tensor = torch.ones((), dtype=torch.float64, device="cpu")
        self.d_max_tensor = torch.zeros((), dtype=torch.float64, device="cpu")
        self.r_max, self.d_max = r_max, d_max

    @property
    def r_max(self) -> float:
        """r is clipped to [1 / r_max, r_max]."""
        return self._r_max

    @r_max.setter
    def r_max(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 1):
            raise UsageError(
                f"r_max is {value}, but must be a finite number of at least 1: r is kept in [1/r_max, r_max]."
            )
        self._r_max = float(value)
        self.r_max_tensor.fill_(self._r_max)

    @property
    def d_max(self) -> float:
        """d is clipped to [-d_max, d_max]."""
        return self._d_max

    @d_max.setter
    def d_max(self, value: float) -> None:
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(
                f"d_max is {value}, but must be a finite number of at least 0: d is kept in [-d_max, d_max]."
            )
        self._d_max = float(value)
        self.d_max_tensor.fill_(self._d_max)

    def read(self) -> tuple[float, float] | tuple[Tensor, Tensor]:
        """(r_max, d_max) for a layer's forward: tensors while it is being compiled, else numbers."""
        if torch.compiler.is_compiling():
            return snapshot(self.r_max_tensor), snapshot(self.d_max_tensor)
        return self._r_max, self._d_max


class RenormSchedule(Limits):
    """r_max and d_max over a training run, in the shape of Ioffe 2017, section 4.

    During the warm-up the limits are 1 and 0, which is plain BN. Then each rises linearly to its final value and stays
    there. Attached layers read the schedule at every forward pass; call ``advance`` after every optimizer step.

    Args:
        steps: Optimizer steps of the run.
        r_max, d_max: Final limits.
        warmup: Fraction of the run with limits 1 and 0.
        r_ramp, d_ramp: Fractions of the run after which r_max and d_max have their final values.

    Raises:
        UsageError: An argument is out of range, or a ramp would end before the warm-up.

    Example:
        >>> schedule = RenormSchedule(steps=500)
        >>> schedule.attach(nn.Sequential(BatchRenorm2d(8)))
        1
        >>> schedule.at(500)
        (3.0, 5.0)
    """

    def __init__(
        self,
        steps: int,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: float = 5 / 130,
        r_ramp: float = 40 / 130,
        d_ramp: float = 25 / 130,
    ) -> None:
        if steps < 1:
            raise UsageError(
                f"steps is {steps}, but a schedule needs the number of optimizer steps of the run, at least 1."
            )
        for name, ramp in (("r_ramp", r_ramp), ("d_ramp", d_ramp)):
            if not 0 <= warmup <= ramp <= 1:
                raise UsageError(
                    f"warmup is {warmup:g} and {name} is {ramp:g}, but as fractions of the run they must satisfy"
                    f" 0 <= warmup <= {name} <= 1."
                )
        super().__init__(r_max, d_max)  # validates the ends
        self._steps, self._warmup, self._ramps = steps, warmup, (r_ramp, d_ramp)
        self._ends = (self.r_max, self.d_max)
        self._set(0)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far, at most ``steps``."""
        return self._step

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self._steps

    def at(self, step: int) -> tuple[float, float]:
        """(r_max, d_max) after ``step`` optimizer steps."""
        r_part, d_part = (_progress(step / self._steps, self._warmup, ramp) for ramp in self._ramps)
        r_end, d_end = self._ends
        return 1 + r_part * (r_end - 1), d_part * d_end

    def advance(self) -> None:
        """Count one optimizer step; after the last one, the limits stay as they are."""
        self._set(min(self._step + 1, self._steps))

    def attach(self, model: nn.Module) -> int:
        """Make every Batch Renorm layer of a model follow this schedule.

        Returns:
            The number of these layers.
        """
        layers = [module for module in model.modules() if isinstance(module, BatchRenormBase)]
        for layer in layers:
            layer.schedule = self
        return len(layers)

    def state_dict(self) -> dict[str, Any]:
        """The settings and ``step``, as plain numbers."""
        return {**self._settings(), "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the saved step of a schedule with the same settings.

        Raises:
            StateError: The saved schedule has other settings, or its step is out of range. This one is unchanged.
        """
        for name, value in self._settings().items():
            if state.get(name) != value:
                raise StateError(
                    f"The saved Batch Renorm schedule has {name} = {state.get(name)}, but this run has {value}:"
                    " resume with the settings of the saved run, or start a new run."
                )
        step = state.get("step")
        if not isinstance(step, int) or not 0 <= step <= self._steps:
            raise StateError(f"The saved Batch Renorm schedule is at step {step} of {self._steps}: it is damaged.")
        self._set(step)

    def _settings(self) -> dict[str, float]:
        names = ("steps", "r_max", "d_max", "warmup", "r_ramp", "d_ramp")
        return dict(zip(names, (self._steps, *self._ends, self._warmup, *self._ramps), strict=True))

    def _set(self, step: int) -> None:
        self._step = step
        self.r_max, self.d_max = self.at(step)


class BatchRenormBase(_BatchNorm):
    """Base class of the Batch Renorm layers (Ioffe 2017; docs/explanation/batch-renorm.md).

    In training the layer normalizes with the batch statistics, corrected towards the running statistics within limits
    (see ``functional.batch_renorm`` for the formula). At inference it is BN. Parameters and buffers are those of
    ``nn.BatchNorm``, so weights load strictly both ways.

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

    Attributes:
        running_mean: Shape (channels,).
        running_var: Shape (channels,), unbiased.
        schedule: If not None, the limits are read from it at every forward pass.

    Raises:
        UsageError: A limit is out of range.
    """

    normalizes_only: ClassVar[bool] = True
    dimensions: ClassVar[tuple[int, int]] = (2, 5)
    """Smallest and largest number of dimensions of an input."""

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
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype)
        self.schedule: RenormSchedule | None = None
        self._limits = Limits(r_max, d_max)
        self._clipped: Tensor | None = None  # where a ClippingWatch counts

    @property
    def r_max(self) -> float:
        """r is clipped to [1 / r_max, r_max]."""
        return self.limits.r_max

    @r_max.setter
    def r_max(self, value: float) -> None:
        self._own_limits(value, self.d_max)

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

    def forward(self, input: Tensor) -> Tensor:
        """Normalize an input of shape (N, C, *space); in training, also update the running statistics.

        Raises:
            ValueError: The input has the wrong number of dimensions, or eps is not positive in training.
        """
        self._check_input_dim(input)
        r_max, d_max = self.limits.read()
        momentum = self._count_batch() if self.training else 0.0
        settings: dict[str, Any] = {"momentum": momentum, "eps": self.eps, "r_max": r_max, "d_max": d_max}
        if self._clipped is not None:
            settings["clipped"] = self._clipped
        return self._normalize(input, training=self.training, **settings)

    def extra_repr(self) -> str:
        own = f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}"
        return f"{own}, r_max={self.r_max:g}, d_max={self.d_max:g}"

    def _normalize(self, input: Tensor, **settings: Any) -> Tensor:
        return batch_renorm(input, *self._statistics(), self.weight, self.bias, **settings)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        assert self.running_mean is not None  # the statistics are always tracked
        assert self.running_var is not None
        return self.running_mean, self.running_var

    def _check_input_dim(self, input: Tensor) -> None:
        least, most = self.dimensions
        if least <= input.dim() <= most:
            return
        kind, wanted = type(self).__name__, f"{least}" if least == most else f"{least} to {most}"
        raise ValueError(
            f"{kind} expected an input of {wanted} dimensions, but got {input.dim()}: shape {tuple(input.shape)}."
        )

    def _count_batch(self) -> float | Tensor:
        """Count the batch and return its weight in the running statistics, as a tensor if that depends on the count."""
        assert self.num_batches_tracked is not None  # the statistics are always tracked
        self.num_batches_tracked.add_(1)
        return self.num_batches_tracked.double().reciprocal() if self.momentum is None else self.momentum

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

    The other arguments are those of ``BatchRenormBase``.
    """

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
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, r_max, d_max, device, dtype)
        self.process_group = process_group

    def _normalize(self, input: Tensor, **settings: Any) -> Tensor:
        group = self.process_group
        return sync_batch_renorm(input, *self._statistics(), self.weight, self.bias, process_group=group, **settings)


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


def _progress(now: float, start: float, end: float) -> float:
    """Progress of a ramp, in [0, 1]; all arguments are fractions of the run."""
    if now >= end:
        return 1.0
    return max(0.0, (now - start) / (end - start)) if end > start else 0.0

"""Batch Renormalization layers (Ioffe 2017), which save and deploy as BN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.nn.functional import batch_renorm, sync_batch_renorm
from bnprobe.nn.limits import Limits

if TYPE_CHECKING:
    from bnprobe.nn.schedule import RenormSchedule


class BatchRenormBase(_BatchNorm):
    """What the Batch Renorm layers share.

    Training normalizes with the statistics of the batch, corrected towards the running statistics within limits;
    inference is that of BN. Parameters, buffers and their names are those of ``nn.BatchNorm``, so weights load strictly
    both ways. One value per channel, where BN raises in training, is allowed: the running statistics then normalize.
    Under activation checkpointing the statistics move twice per step, as in BN, and the gradients are those of r and d
    as computed the second time.

    Args:
        num_features: Channels.
        eps: Added to the variance inside the root.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Have a weight and a bias per channel.
        r_max, d_max: Limits of the correction; 1 and 0 make it BN. May be set later, which ends a schedule's say.
        device, dtype: Of parameters and buffers.

    Attributes:
        schedule: Where set, the limits come from here at every forward.

    Raises:
        UsageError: A limit is out of range.
    """

    dimensions: ClassVar[tuple[int, int]] = (2, 5)
    """Fewest and most dimensions of an input."""

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
        self._clipped: Tensor | None = None

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
        """The limits in force: those of the schedule, if there is one."""
        return self._limits if self.schedule is None else self.schedule

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (N, C, *space); updates the running statistics in training."""
        self._check_input_dim(input)
        r_max, d_max = self.limits.read()
        momentum = self._count_batch() if self.training else 0.0
        settings: dict[str, Any] = {"momentum": momentum, "eps": self.eps, "r_max": r_max, "d_max": d_max}
        if self._clipped is not None:
            settings["clipped"] = self._clipped
        return self._normalize(input, training=self.training, **settings)

    def count_clipped(self, into: Tensor | None) -> None:
        """Add to ``into`` in training as ``functional.batch_renorm`` says; None: count no more."""
        self._clipped = into

    def counts_clipped_into(self, counts: Tensor) -> bool:
        """Whether these are the counts that the layer adds to."""
        return self._clipped is counts

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
        """Count a batch; its weight in the running statistics, a tensor where that depends on the count."""
        assert self.num_batches_tracked is not None  # the statistics are always tracked
        self.num_batches_tracked.add_(1)
        return self.num_batches_tracked.double().reciprocal() if self.momentum is None else self.momentum

    def _own_limits(self, r_max: float, d_max: float) -> None:
        self._limits.r_max, self._limits.d_max = r_max, d_max
        self.schedule = None


class BatchRenorm1d(BatchRenormBase, nn.BatchNorm1d):
    """Batch Renorm of (N, C) or (N, C, L); arguments as for ``BatchRenormBase``."""

    dimensions = (2, 3)


class BatchRenorm2d(BatchRenormBase, nn.BatchNorm2d):
    """Batch Renorm of (N, C, H, W); arguments as for ``BatchRenormBase``."""

    dimensions = (4, 4)


class BatchRenorm3d(BatchRenormBase, nn.BatchNorm3d):
    """Batch Renorm of (N, C, D, H, W); arguments as for ``BatchRenormBase``."""

    dimensions = (5, 5)


class SyncBatchRenorm(BatchRenormBase):
    """Batch Renorm with the batch statistics of all processes together, on any device; one process alone will do too.

    Args:
        process_group: Processes that share their statistics; None: all.

    The other arguments are those of ``BatchRenormBase``, as is the input, of 2 to 5 dimensions.
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

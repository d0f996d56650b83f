"""What layers share that normalize a sample by its own statistics and by the running ones (internal)."""

from __future__ import annotations

from typing import Any, ClassVar

from bnprobe.errors import UsageError
from bnprobe.nn.base import BatchNormLike, takes_numbers


class BlendedBatchNorm(BatchNormLike):
    """Base class of layers with a fixed weight of the sample's own statistics, which is a setting, like eps.

    Args:
        blend: The weight, in [0, 1]; may be set later.

    The other arguments are those of ``BatchNormLike``.

    Raises:
        UsageError: ``blend`` is out of range.
    """

    __constants__ = [*BatchNormLike.__constants__, "blend"]  # noqa: RUF012 (as torch has it)
    __jit_unused_properties__: ClassVar[list[str]] = [
        *BatchNormLike.__jit_unused_properties__,
        "blend",
        "deployment_obstacle",
    ]

    @takes_numbers
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        blend: float = 0.5,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype, bias=bias)
        self.blend = blend

    @property
    def blend(self) -> float:
        """Weight of the sample's own statistics."""
        return self._blend

    @blend.setter
    def blend(self, value: float) -> None:
        if not 0 <= value <= 1:
            raise UsageError(f"blend is {value}, but must be from 0 (running statistics) to 1 (instance norm).")
        self._blend = float(value)

    @property
    def deployment_obstacle(self) -> str | None:
        """Why plain BN with the same weights gives another output at inference, a clause; None if it does not."""
        if self.blend == 0:
            return None
        return f"is {type(self).__name__} with blend {self.blend:g}: only at 0 is it BN at inference"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blend={self.blend:g}"

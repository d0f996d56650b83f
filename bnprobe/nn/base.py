"""What the layers of this package have in common (internal)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from inspect import signature
from types import CodeType
from typing import Any, ClassVar, ParamSpec, SupportsFloat, SupportsIndex, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bnprobe.errors import UsageError
from bnprobe.nn.plain import cut, normalize_running

_Arguments = ParamSpec("_Arguments")

_NUMBERS: dict[str, tuple[type, str]] = {"int": (SupportsIndex, "a whole number"), "float": (SupportsFloat, "a number")}
"""What an annotation takes: numbers of NumPy and torch, too."""


def takes_numbers(initialize: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Have the initializer of a layer refuse BN's ``track_running_stats``, and settings that are not numbers.

    It is the fifth argument of ``nn.BatchNorm``, where other layers have a setting for which True would pass as 1.
    """
    names = list(signature(initialize).parameters)[1:]
    annotations = {name: str(each.annotation) for name, each in signature(initialize).parameters.items()}

    @wraps(initialize)
    def checked(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        kind, fifth = type(args[0]).__name__, args[5] if len(args) > 5 else None
        if "track_running_stats" in kwargs or isinstance(fifth, bool):
            raise UsageError(
                f"{kind} does not take track_running_stats, the fifth argument of nn.BatchNorm: it always keeps running"
                " statistics. Leave it out."
            )
        for name, value in {**dict(zip(names, args[1:], strict=False)), **kwargs}.items():
            wanted, number = _NUMBERS.get(annotations.get(name, "").removesuffix(" | None"), (object, ""))
            if number and value is not None and (isinstance(value, bool) or not isinstance(value, wanted)):
                raise UsageError(f"{kind}: {name} is {value!r}, but must be {number}.")
        initialize(*args, **kwargs)

    return checked


class BatchNormLike(_BatchNorm):
    """Base class of layers that take the place of BN, with its parameters, buffers and keys of the state_dict.

    Eager code calls ``_normalize``, which a subclass is free to write as it likes. TorchScript compiles ``_scripted``
    instead, in plain operations. ``torch.fx`` sees a leaf, as it does for ``nn.BatchNorm``.

    ``nn.SyncBatchNorm.convert_sync_batchnorm`` and functions like it would turn these layers into plain BN, and
    ``fuse_conv_bn_eval`` fold those that are not BN at inference as if they were: all raise instead.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Whether there is a weight and a bias per channel.
        device, dtype: Of parameters and buffers.
        bias: Whether an affine layer has a bias.

    Attributes:
        running_mean: Shape (channels,).
        running_var: Shape (channels,), unbiased.
        track_running_stats: If set to False, the running statistics are used but not moved, as in BN.
    """

    normalizes_only: ClassVar[bool] = True
    already: ClassVar[str] = ""
    """The repair target to the end of another library's conversion, if its layers are of this class."""
    __jit_unused_properties__: ClassVar[list[str]] = ["eps"]

    @takes_numbers
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, True, device, dtype, bias=bias)

    @property
    def eps(self) -> float:
        """Added to the variance before the square root."""
        if not torch.compiler.is_compiling():
            self._refuse_undoing(sys._getframe(1).f_code)
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = value

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize an input of shape (N, C, *space); in training, also update the running statistics.

        Args:
            input: The values.
            mask: Bool, shape (N, *space), True where there is a value and not padding. Elsewhere the input does not
                matter, NaN included, and the output is 0.

        Raises:
            ValueError: The input or the mask has the wrong shape, the mask is no tensor of dtype bool, or eps is out of
                range.
            UsageError: The layer has lost its running statistics.
        """
        if torch.jit.is_scripting():
            self._check_input_dim(input)
            return cut(self._scripted(cut(input, mask), mask), mask)
        else:  # noqa: RET505 (a script leaves this branch out)
            return self._run(input, mask)

    def extra_repr(self) -> str:
        own = f"{self.num_features}, eps={self._eps}, momentum={self.momentum}, affine={self.affine}"
        return own if self.bias is not None or not self.affine else f"{own}, bias=False"

    def leave(self) -> None:
        """Called when a layer of another class takes the place of this one: take back what it did to its model."""

    def _run(self, input: Tensor, mask: Tensor | None) -> Tensor:
        if isinstance(input, Proxy):
            return _leaf(self, input, mask)
        if mask is not None and not isinstance(mask, Tensor):
            raise ValueError(f"expected a mask that is a tensor of dtype torch.bool, but got {type(mask).__name__}")
        self._check_input_dim(input)
        if self.running_mean is None or self.running_var is None:
            raise UsageError(
                f"{type(self).__name__} has lost its running statistics, without which it cannot normalize"
                " (torch.func.replace_all_batch_norm_modules_ takes them away): leave it as it is, or turn it back into"
                " BN first."
            )
        self._check_eps()
        if mask is None:
            return self._normalize(input, None)
        return cut(self._normalize(cut(input, mask), mask), mask)

    def _normalize(self, input: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _scripted(self, input: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _check_eps(self) -> None:
        if self._eps < 0 or (self._eps == 0 and self.training):
            kind = "positive in training" if self.training else "at least 0"
            raise ValueError(f"{type(self).__name__} needs an eps that is {kind}, but has {self._eps}.")

    def _at_inference(self, input: Tensor) -> Tensor:
        """Normalize as BN does at inference."""
        mean, variance = self._statistics()
        return normalize_running(input, mean, variance, self.weight, self.bias, self._eps)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        mean, variance = self.running_mean, self.running_var
        assert mean is not None  # _run has looked
        assert variance is not None
        return mean, variance

    def _count_batch(self) -> float:
        """Count a batch and return its weight in the running statistics.

        (A tensor of shape () for the cumulative average: reading the count would wait for the device.)
        """
        count = self.num_batches_tracked
        if count is not None and self.track_running_stats:
            count.add_(1)
        if self.momentum is not None:
            return self.momentum
        assert count is not None
        if torch.jit.is_scripting():
            return 1.0 / max(float(count), 1.0)
        else:  # noqa: RET505 (a script leaves this branch out)
            return cast(float, count.double().clamp(min=1).reciprocal())

    def _refuse_undoing(self, caller: CodeType) -> None:
        """Raise if PyTorch asks for eps in order to replace this layer by something that it is not."""
        kind, obstacle = type(self).__name__, getattr(self, "deployment_obstacle", None)
        if (to := _CONVERTING.get(caller.co_name)) is not None:
            advice = f'Convert the layers with to="{to}" instead.'
            if self.already == to:
                advice = f'It is what to="{to}" makes already, and needs no such call.'
            elif to == "sync":
                advice = (
                    'Call it before the layers are converted (to="batch-renorm" keeps them synchronized), or convert'
                    ' them with to="sync".'
                )
            raise UsageError(f"{caller.co_name} would turn {kind} into plain BN, which undoes the repair. {advice}")
        if caller is _FUSE and obstacle:
            raise UsageError(f"This layer cannot be folded into a convolution as BN can: it {obstacle}.")


_CONVERTING = {
    "convert_sync_batchnorm": "sync",
    "convert_syncbn_model": "sync",
    "convert_frozen_batchnorm": "frozen",
}
"""Functions of torch.nn.SyncBatchNorm and timm, of apex, of torchvision and detectron2; the target to the same end."""

_FUSE: CodeType = fuse_conv_bn_eval.__code__
"""None of these functions asks a layer whether it may be replaced, but all read its eps."""


def in_parts(
    normalize: Callable[[Tensor, Tensor | None], Tensor], input: Tensor, mask: Tensor | None, number: int
) -> Tensor:
    """Normalize a batch in equal parts of consecutive samples, one after the other (ghost batches).

    Args:
        normalize: Of a part and its mask.
        input: Shape (N, C, *space).
        mask: Shape (N, *space), or None.
        number: Of parts; their sizes differ by at most one.
    """
    if number == 1:
        return normalize(input, mask)
    masks = (None,) * number if mask is None else torch.tensor_split(mask, number)
    return torch.cat([normalize(*part) for part in zip(torch.tensor_split(input, number), masks, strict=True)])


def _leaf(layer: nn.Module, input: Proxy, mask: Any) -> Any:
    """The call of a layer as one node of the graph that ``torch.fx`` records: it cannot follow checks of shapes."""
    tracer = input.tracer
    named = {} if mask is None else {"mask": mask}
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input,), named)  # type: ignore[attr-defined]

"""The families of normalization layers that can be measured: one class and one row of ``NORMS`` each.

A family knows how its layers call their functional form. A scan intercepts that function, not the layer's ``forward``,
so a subclass that does more than normalize (an activation, a drop block) keeps doing it.

Other packages add a family through the entry-point group ``bnprobe.norms``, see ``bnprobe.registry``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnprobe.errors import ModelError
from bnprobe.nn.batch_renorm import BatchRenormBase
from bnprobe.nn.cross_iteration import CrossIterationBatchNorm
from bnprobe.nn.example_weighing import ExampleWeighedBatchNorm
from bnprobe.nn.frozen import FrozenBatchNorm
from bnprobe.nn.functional import batch_renorm, sync_batch_renorm
from bnprobe.nn.gated import GatedBatchNorm, gated_batch_norm
from bnprobe.nn.ghost import GhostBatchNorm, ghost_batch_norm
from bnprobe.nn.moving_average import MovingAverageBatchNorm
from bnprobe.nn.per_domain import DomainBatchNorm
from bnprobe.nn.plain import parts_of
from bnprobe.numbers import count
from bnprobe.registry import Registry
from bnprobe.stats.moments import Corrections, corrections, eps_of_std


@dataclass(frozen=True)
class NormCall:
    """The arguments of one call of a functional form.

    Attributes:
        input: Shape (rows, channels, *space).
        running_mean, running_variance: Shape (channels,), the variance unbiased; None where the layer keeps none.
        weight, bias: Shape (channels,); None without affine parameters.
        training: Normalize with the statistics of the batch.
        eps: Added to the variance before the square root.
        r_max, d_max: Limits of Batch Renorm's correction in training; 1 and 0: plain BN.
        gate: Weight of the batch statistics in gated BN, shape (channels,); None: 0.
        momentum: Weight of the batch in the running statistics; None: not known.
        unbiased: Batches are normalized with their unbiased variance.
        on_std: eps is added to the standard deviation, not to the variance.
        masked: The call leaves out positions of the input, which a scan cannot.
    """

    input: Tensor
    running_mean: Tensor | None
    running_variance: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    eps: float
    r_max: float = 1.0
    d_max: float = 0.0
    gate: Tensor | None = None
    momentum: float | None = None
    unbiased: bool = False
    on_std: bool = False
    masked: bool = False

    def eps_for(self, variance: Tensor) -> Tensor | float:
        """What the layer in effect adds to a variance before the square root."""
        return eps_of_std(variance, self.eps) if self.on_std else self.eps

    def corrections(self, mean: Tensor, variance: Tensor) -> Corrections | None:
        """The layer's correction of batch statistics, without gradient; None for plain BN.

        Args:
            mean, variance: Shape (batches, channels), float64; the variance is biased.
        """
        if (self.r_max, self.d_max) == (1, 0) or self.running_mean is None or self.running_variance is None:
            return None
        running = self.running_mean.to(mean), self.running_variance.to(mean)
        r_max, d_max, own = (torch.full_like(running[0], limit) for limit in (self.r_max, self.d_max, self.eps))
        gate = None if self.gate is None else self.gate.to(mean)
        eps, std_eps = own + self.eps_for(running[1]) - self.eps, own if self.on_std else None
        return corrections(mean.detach(), variance.detach(), *running, eps, r_max, d_max, gate, None, std_eps)


@dataclass(frozen=True)
class NormInfo:
    """The settings of a layer.

    Attributes:
        channels: Number of channels.
        eps: Added to the variance before the square root.
        momentum: Weight of the new batch in the running average; None: cumulative average.
        batches_tracked: Updates of the running statistics so far; None if the layer does not count.
        running_mean, running_variance: Shape (channels,), the variance unbiased; None where none are kept.
        r_max, d_max: Limits of Batch Renorm's correction in training; 1 and 0: plain BN.
        gate, unbiased, on_std: As in ``NormCall``.
    """

    channels: int
    eps: float
    momentum: float | None
    batches_tracked: int | None
    running_mean: Tensor | None
    running_variance: Tensor | None
    r_max: float = 1.0
    d_max: float = 0.0
    gate: Tensor | None = None
    unbiased: bool = False
    on_std: bool = False

    @property
    def eps_of_channels(self) -> Tensor:
        """What is in effect added to the running variance before the square root, float64, shape (channels,)."""
        eps = torch.full((self.channels,), self.eps, dtype=torch.float64)
        if self.on_std and self.running_variance is not None:
            return eps_of_std(self.running_variance.double(), self.eps).cpu()
        return eps

    @property
    def std_eps(self) -> float:
        """What is added to the standard deviation: eps, or 0."""
        return self.eps if self.on_std else 0.0

    @property
    def corrects(self) -> bool:
        """Whether the layer corrects its batch statistics in training, as Batch Renorm and gated BN do."""
        return (self.r_max, self.d_max) != (1, 0)


class NormFamily(Protocol):
    """A family of layers that call the same functional form."""

    @property
    def name(self) -> str:
        """Unique, e.g. "batch-norm"."""

    @property
    def functionals(self) -> tuple[Callable[..., Tensor], ...]:
        """The functions that are intercepted.

        A ``TorchFunctionMode`` must see their calls. PyTorch's own functions do that by themselves; others begin with
        ``torch.overrides.handle_torch_function``, as ``bnprobe.nn.functional.batch_renorm`` does.
        """

    def matches(self, module: nn.Module) -> bool:
        """Whether the module is a layer of this family, subclasses included."""

    def obstacle(self, module: nn.Module) -> str | None:
        """Why this layer cannot be measured as it is, or None."""

    def describe(self, module: nn.Module) -> NormInfo:
        """The settings of a layer that has no obstacle."""

    def parse(self, *args: Any, **kwargs: Any) -> NormCall:
        """Read the arguments of a call of one of ``functionals``."""

    def evaluate(self, call: NormCall) -> Tensor:
        """The layer's own output with its running statistics, in the dtype of the input."""

    def note(self, info: NormInfo) -> str | None:
        """What a reader of the report should know about a layer of this family, a clause; None if nothing."""


@runtime_checkable
class GroupsRows(Protocol):
    """A norm family that divides a micro-batch itself (ghost batches, frames of a video, ...)."""

    def rows_per_group(self, module: nn.Module, call: NormCall, rows: int) -> int:
        """How many consecutive rows of a micro-batch are normalized together in this call.

        Args:
            module: The layer.
            call: Its call, on one micro-batch or on several.
            rows: Rows of one micro-batch in this call.

        Returns:
            A divisor of ``rows``; ``rows`` itself for the whole micro-batch.
        """


_NOT_FOLLOWED: dict[tuple[type[nn.Module], ...], str] = {
    (MovingAverageBatchNorm, CrossIterationBatchNorm): (
        "statistics of earlier batches, too, which a scan of single batches does not follow"
    ),
    (ExampleWeighedBatchNorm,): (
        "example weighing: at inference every sample's own statistics enter, so running statistics are not all it uses"
    ),
    (DomainBatchNorm,): "statistics per domain, which a scan does not tell apart",
}
"""Layers of bnprobe.nn that no scan can measure, and why."""


class BatchNormFamily:
    """torch.nn's BatchNorm1d/2d/3d, SyncBatchNorm and LazyBatchNorm, and their subclasses."""

    name = "batch-norm"
    functionals: tuple[Callable[..., Tensor], ...] = (F.batch_norm,)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, _BatchNorm)

    def obstacle(self, module: nn.Module) -> str | None:
        for kinds, reason in _NOT_FOLLOWED.items():
            if isinstance(module, kinds):
                return reason
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(is_lazy(tensor) for tensor in tensors):
            return "lazy layer that has not seen a batch yet: run the model once before scanning it"
        for name in ("running_mean", "running_var"):
            values, channels = getattr(module, name, None), getattr(module, "num_features", None)
            if isinstance(values, Tensor) and values.numel() != channels:
                return f"its {name} holds {values.numel()} values for {channels} channels, as ghost batches may have"
        agrees: str | None = getattr(module, "nothing_to_measure", None)
        return agrees

    def describe(self, module: nn.Module) -> NormInfo:
        assert isinstance(module, _BatchNorm)  # matches() said so
        tracked = module.num_batches_tracked
        return NormInfo(
            channels=module.num_features,
            eps=module.eps,
            momentum=module.momentum,
            batches_tracked=None if tracked is None else int(tracked),
            running_mean=module.running_mean,
            running_variance=module.running_var,
        )

    def parse(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> NormCall:
        return NormCall(input, running_mean, running_var, weight, bias, training, eps, momentum=momentum)

    def evaluate(self, call: NormCall) -> Tensor:
        return F.batch_norm(
            call.input,
            call.running_mean,
            call.running_variance,
            call.weight,
            call.bias,
            training=False,
            eps=call.eps,
        )

    def note(self, info: NormInfo) -> str | None:
        return None


class BatchRenormFamily(BatchNormFamily):
    """bnprobe.nn's BatchRenorm1d/2d/3d and SyncBatchRenorm, which correct their batch statistics in training."""

    name = "batch-renorm"
    functionals: tuple[Callable[..., Tensor], ...] = (batch_renorm, sync_batch_renorm)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, BatchRenormBase)

    def obstacle(self, module: nn.Module) -> str | None:
        if getattr(module, "renorm_momentum", None) is not None:
            return "r and d refer to averages of their own (renorm_momentum), which a scan does not compare with"
        if getattr(module, "_r_min", None) is not None:
            return "r has a lower limit of its own (r_min), which a scan does not know"
        return super().obstacle(module)

    def describe(self, module: nn.Module) -> NormInfo:
        assert isinstance(module, BatchRenormBase)  # matches() said so
        return replace(super().describe(module), r_max=module.r_max, d_max=module.d_max)

    def parse(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.01,
        eps: float = 1e-5,
        r_max: float | Tensor = 3.0,
        d_max: float | Tensor = 5.0,
        **others: Any,
    ) -> NormCall:
        call = super().parse(input, running_mean, running_var, weight, bias, training, momentum, eps)
        return replace(call, r_max=float(r_max), d_max=float(d_max), masked="mask" in others)

    def note(self, info: NormInfo) -> str | None:
        if not info.corrects:
            return None
        limits = f"r_max {info.r_max:g}, d_max {info.d_max:g}"
        return f"Batch Renorm ({limits}): D is the mismatch that remains after its correction; r and d are not clipped"


class GatedFamily(BatchNormFamily):
    """bnprobe.nn's gated BN: in training, a correction without limits, of which the gate leaves a part."""

    name = "gated"
    functionals: tuple[Callable[..., Tensor], ...] = (gated_batch_norm,)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, GatedBatchNorm)

    def describe(self, module: nn.Module) -> NormInfo:
        assert isinstance(module, GatedBatchNorm)  # matches() said so
        return replace(super().describe(module), r_max=math.inf, d_max=math.inf, gate=module.gate.detach())

    def parse(self, *args: Any, **kwargs: Any) -> NormCall:
        x, layer, *mask = args
        own = (layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training, layer.eps)
        gate = layer.gate.detach()
        return NormCall(x, *own, r_max=math.inf, d_max=math.inf, gate=gate, masked=bool(mask))

    def note(self, info: NormInfo) -> str | None:
        gate = math.nan if info.gate is None else float(info.gate.mean())
        return f"gated (mean gate {gate:.2f}): D is the mismatch that remains after the gates; r and d are not clipped"


class GhostFamily(BatchNormFamily):
    """bnprobe.nn's ghost batch norm: every part of a micro-batch with its own statistics."""

    name = "ghost-batch-norm"
    functionals: tuple[Callable[..., Tensor], ...] = (ghost_batch_norm,)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, GhostBatchNorm)

    def parse(self, *args: Any, **kwargs: Any) -> NormCall:
        x, layer, *mask = args
        own = (layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.training, layer.eps)
        return NormCall(x, *own, momentum=layer.momentum, masked=bool(mask))

    def rows_per_group(self, module: nn.Module, call: NormCall, rows: int) -> int:
        assert isinstance(module, GhostBatchNorm)  # matches() said so
        number = parts_of(rows, module.virtual_batch_size)
        if rows % number:
            raise ModelError(
                f"A scan needs ghost batches of one size, but a batch of {count(rows, 'row')} has {number} parts of at"
                f" most {module.virtual_batch_size} (virtual_batch_size): choose a batch size that is a multiple of it."
            )
        return rows // number

    def note(self, info: NormInfo) -> str | None:
        return "normalizes ghost batches: figures are per part of a batch"


@dataclass(frozen=True)
class Place:
    """Where the statistics of one layer lie: consecutive values of a tensor that a module holds.

    Attributes:
        attribute: Name of the tensor.
        channels: Number of values.
        start: The first of them.
    """

    attribute: str
    channels: int
    start: int = 0

    def of(self, module: nn.Module) -> Tensor:
        """A view of them, shape (channels,)."""
        values: Tensor = getattr(module, self.attribute).detach()
        return values.reshape(-1)[self.start : self.start + self.channels]


@dataclass(frozen=True)
class FunctionFamily(BatchNormFamily):
    """A module that gives buffers of its own to ``F.batch_norm``; what the calls say stands in for attributes.

    Attributes:
        mean, variance: Its running statistics.
        eps, momentum: Of the calls.
        counter: Name of the tensor that counts the updates; None: nothing does.
    """

    mean: Place
    variance: Place
    eps: float
    momentum: float | None
    counter: str | None = None

    name = "function"

    def matches(self, module: nn.Module) -> bool:
        return False  # found by running the model

    def describe(self, module: nn.Module) -> NormInfo:
        return NormInfo(
            channels=self.mean.channels,
            eps=self.eps,
            momentum=self.momentum,
            batches_tracked=_count(module, self.counter),
            running_mean=self.mean.of(module),
            running_variance=self.variance.of(module),
        )

    def note(self, info: NormInfo) -> str | None:
        return f"batch_norm called as a function, with {self.mean.attribute} and {self.variance.attribute}"


def _count(module: nn.Module, counter: str | None) -> int | None:
    return None if counter is None else int(getattr(module, counter))


@dataclass(frozen=True)
class StatisticsForm:
    """How a module keeps a variance: ``variance_of`` what it keeps, and ``kept_as``, the inverse."""

    variance_of: Callable[[Tensor], Tensor]
    kept_as: Callable[[Tensor], Tensor]


FORMS = {
    "variance": StatisticsForm(lambda kept: kept, lambda variance: variance),
    "std": StatisticsForm(torch.square, torch.sqrt),
    "log_variance": StatisticsForm(torch.exp, torch.log),
    "log_std": StatisticsForm(lambda kept: (2 * kept).exp(), lambda variance: variance.log() / 2),
}
"""The forms in which a variance may be kept, by their names in ``norm_classes``."""


@dataclass(frozen=True)
class WholeModule(BatchNormFamily):
    """A module that normalizes by arithmetic of its own, with buffers that it keeps.

    It calls no function that could be intercepted, so its input is answered instead. In eval mode it gives
    f((x - m) / s) for some f that is affine in each channel; in training f((x - mu_B) / s_B). On the input m + s * z it
    therefore gives f(z) in eval mode, for every z that a pass may ask for: a call has s for its weight and m for its
    bias.

    Attributes:
        mean, variance: Names of the buffers.
        form: One of ``FORMS``, for ``variance``.
        eps: Added to the variance before the square root; ``on_std``: to the standard deviation.
        momentum: Weight of the batch in the buffers, as measured.
        unbiased: In training, it normalizes with the unbiased variance of the batch.
        r_max, d_max: Limits of Batch Renorm's correction in training; 1 and 0: none.
        argument: Position or name of the argument that is normalized.
        axis: That of the channels: 1 or -1.
    """

    mean: str
    variance: str
    form: str
    eps: float
    momentum: float | None = None
    unbiased: bool = False
    r_max: float = 1.0
    d_max: float = 0.0
    argument: int | str = 0
    axis: int = 1
    on_std: bool = False

    name = "own"
    functionals = ()

    def matches(self, module: nn.Module) -> bool:
        return False  # found by running the model

    def describe(self, module: nn.Module) -> NormInfo:
        mean = getattr(module, self.mean).detach().reshape(-1)
        return NormInfo(
            channels=mean.numel(),
            eps=self.eps,
            momentum=self.momentum,
            batches_tracked=None,
            running_mean=mean,
            running_variance=FORMS[self.form].variance_of(getattr(module, self.variance).detach().reshape(-1)),
            r_max=self.r_max,
            d_max=self.d_max,
            unbiased=self.unbiased,
            on_std=self.on_std,
        )

    def std_of(self, variance: Tensor) -> Tensor:
        """What the layer divides by, for a variance."""
        return variance.sqrt() + self.eps if self.on_std else (variance + self.eps).sqrt()

    def input_of(self, args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The argument that is normalized; None if it is not there."""
        if isinstance(self.argument, str):
            return kwargs.get(self.argument)
        return args[self.argument] if self.argument < len(args) else None

    def with_input(self, args: Any, kwargs: dict[str, Any], channels_first: Tensor) -> tuple[Any, dict[str, Any]]:
        """The arguments with another input."""
        values = channels_first.movedim(1, self.axis)
        if isinstance(self.argument, str):
            return args, {**kwargs, self.argument: values}
        return (*args[: self.argument], values, *args[self.argument + 1 :]), kwargs

    def call(self, module: nn.Module, x: Tensor) -> NormCall:
        """A call of the module, as if it were one of a function."""
        info = self.describe(module)
        assert info.running_mean is not None  # by construction
        assert info.running_variance is not None
        mean, std = info.running_mean, self.std_of(info.running_variance)
        return NormCall(
            input=x.movedim(self.axis, 1),
            running_mean=mean,
            running_variance=info.running_variance,
            weight=std,
            bias=mean,
            training=module.training,
            eps=self.eps,
            r_max=self.r_max,
            d_max=self.d_max,
            momentum=self.momentum,
            unbiased=self.unbiased,
            on_std=self.on_std,
        )

    def evaluate(self, call: NormCall) -> Tensor:
        if call.bias is call.running_mean:
            return call.input
        variance = call.running_variance
        assert variance is not None  # the module keeps one
        return super().evaluate(replace(call, running_variance=variance + call.eps_for(variance) - call.eps))

    def write(self, module: nn.Module, mean: Tensor, variance: Tensor) -> None:
        """Put other statistics into the buffers."""
        kept = {self.mean: mean, self.variance: FORMS[self.form].kept_as(variance)}
        for name, values in kept.items():
            buffer = getattr(module, name)
            buffer.copy_(values.reshape(buffer.shape))

    def note(self, info: NormInfo) -> str | None:
        kept = {"variance": ""}.get(self.form, f" ({self.form.replace('_', ' ')})")
        added = ", eps added to the standard deviation" if self.on_std else ""
        told = f"normalizes by its own arithmetic, with {self.mean} and {self.variance}{kept}{added}"
        return f"{told}; Batch Renorm, so D is what its correction leaves" if info.corrects else told


def write_statistics(family: NormFamily, module: nn.Module, mean: Tensor, variance: Tensor) -> None:
    """Put other running statistics into a layer that keeps some.

    Args:
        mean, variance: Shape (channels,).
    """
    if isinstance(family, WholeModule):
        family.write(module, mean, variance)
        return
    info = family.describe(module)
    assert info.running_mean is not None  # the layer keeps some
    assert info.running_variance is not None
    info.running_mean.copy_(mean)
    info.running_variance.copy_(variance)


def place_of(tensor: Tensor | None) -> tuple[int, int, int] | None:
    """What tells the memory of a tensor from that of others; None without any."""
    if tensor is None or tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    return tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel()


NORMS: Registry[NormFamily] = Registry(
    "bnprobe.norms",
    (
        BatchNormFamily(),
        BatchRenormFamily(),
        GatedFamily(),
        GhostFamily(),
    ),
    lambda family: family.name,
    "norm family",
)
"""Every family that can be measured; where several match a layer, the last one is its family."""


def family_of(module: nn.Module) -> NormFamily | None:
    """The family of a layer: the last one that matches, so that a new row may claim a special case of an older one."""
    return next((family for family in reversed(tuple(NORMS)) if family.matches(module)), None)


FROZEN = FrozenBatchNorm.nothing_to_measure
"""Why a norm without batch statistics is skipped."""


def lookalike_reason(module: nn.Module) -> str | None:
    """Why a norm-like module without a family is skipped; None if it is no norm, or always behaves the same."""
    if isinstance(module, _INSTANCE_NORMS):
        return "instance norm with running statistics: not a batch norm" if module.track_running_stats else None
    if isinstance(module, _BATCH_INDEPENDENT):
        return None
    if type(module).__module__.startswith("torch.nn.utils."):  # weight and spectral norm normalize weights
        return None
    kind = type(module).__name__
    own_buffers = {name for name, _ in module.named_buffers(recurse=False)}
    if "frozen" in kind.lower() and own_buffers & _BUFFERS:
        return FROZEN
    if own_buffers & _BUFFERS:
        return f"unknown norm {kind}: it keeps running statistics but does not derive from torch's BatchNorm"
    if _NAME.search(kind) and not any(module.children()):
        return f"unknown norm-like module {kind}"
    return None


_BATCH_INDEPENDENT = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
"""Norms that treat every sample by itself and keep no statistics: training and inference cannot differ."""

_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_BUFFERS = {"running_mean", "running_var", "moving_mean", "moving_variance", "moving_var"}
_NAME = re.compile(r"(batch|sync|instance|frozen|group|layer|re)_?norm|norm([123]d)?$|^a?bn([123]d)?$", re.IGNORECASE)

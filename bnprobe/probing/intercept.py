"""Stand between the layers and their functional form: answer per micro-batch, and record the moments."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnprobe.errors import is_library_file
from bnprobe.norms import NORMS, NormCall, NormFamily
from bnprobe.probing.batches import CannotEmulateError
from bnprobe.probing.grouping import Grouping, Layout, normalize
from bnprobe.probing.layers import ProbedLayer
from bnprobe.probing.swap import Leaves, affine, normalize_together
from bnprobe.stats.mismatch import distance
from bnprobe.stats.moments import Moments, pool_moments

Slot = tuple[int, int]
"""(index of the layer, index of its call within one forward pass)."""


@dataclass(frozen=True)
class Recorded:
    """Moments of one call.

    Attributes:
        mean, variance: Shape (units, channels), float64, biased.
        unit: Images per unit: 1, or the micro-batch.
        values: Values per channel in one micro-batch.
        by_batch: The layer normalized with batch statistics.
        bytes: Size of the input.
    """

    mean: Tensor
    variance: Tensor
    unit: int
    values: int
    by_batch: bool
    bytes: int


@dataclass
class Pass:
    """What one forward pass runs on, and what it records.

    Attributes:
        images: Images in the physical batch.
        batch_size: Images per micro-batch; statistics are taken per group of so many.
        per_image: Where a layer uses its running statistics, record images rather than micro-batches.
        layouts: Of the calls whose layout is known.
        references: Micro-batch moments that the right layout gives: where present, the layout is found by them.
        by_batch: Indices of layers that normalize with their micro-batch's statistics, whatever mode they are in.
        statistics: By index of the layer, (mean, variance), float64 of shape (channels,): stand in for the running
            statistics, as if they were in the buffers, where the layer would use these.
        plain: Batch Renorm normalizes as BN does, uncorrected: for statistics that do not depend on the running ones.
        leaves: Not None: where a layer uses its running statistics, its scale and shift become leaves of the graph, one
            row for each unit of what is recorded, and are put here. Needs grad mode; layers that normalize with batch
            statistics are differentiated through these, of one micro-batch per pass.
        records: In call order.
        entered: Indices of the layers whose forward was called.
        functional: Places in the user's code that call batch_norm outside any layer.
    """

    images: int
    batch_size: int
    per_image: bool = False
    layouts: dict[Slot, Layout] = field(default_factory=dict)
    references: dict[Slot, Moments] = field(default_factory=dict)
    by_batch: frozenset[int] = frozenset()
    statistics: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    plain: bool = False
    leaves: dict[Slot, Leaves] | None = None
    records: dict[Slot, Recorded] = field(default_factory=dict)
    entered: set[int] = field(default_factory=set)
    functional: set[str] = field(default_factory=set)


class Interceptor(TorchFunctionMode):
    """Answers the layers' calls of their functional form; which layer is calling is known from forward hooks.

    A layer that asks for batch statistics gets those of its micro-batch, and its buffers stay as they are. One that
    asks for running statistics gets its own kernel. A pass may say otherwise for some layers.
    """

    def __init__(self, layers: Sequence[ProbedLayer]) -> None:
        super().__init__()
        self._layers = layers
        self._families = {function: family for family in NORMS for function in family.functionals}
        self._callers: list[ProbedLayer] = []
        self._pass: Pass | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hook the layers, and remove the hooks afterwards."""
        handles = []
        try:
            for layer in self._layers:
                handles.append(layer.module.register_forward_pre_hook(self._entering(layer)))
                handles.append(layer.module.register_forward_hook(self._left, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def running(self, pass_: Pass) -> Iterator[Pass]:
        """Intercept and record into ``pass_`` while the block runs."""
        self._pass = pass_
        self._callers.clear()
        with self:
            yield pass_

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        family = self._families.get(func)
        if family is None or self._pass is None:
            return func(*args, **kwargs)
        if not self._callers:
            self._pass.functional.add(_calling_line())
            return func(*args, **kwargs)
        return _answer(self._pass, self._callers[-1], family, family.parse(*args, **kwargs))

    def _entering(self, layer: ProbedLayer) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._callers.append(layer)
            if self._pass is not None:
                self._pass.entered.add(layer.index)

        return hook

    def _left(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._callers:
            self._callers.pop()


def _answer(pass_: Pass, layer: ProbedLayer, family: NormFamily, call: NormCall) -> Tensor:
    slot = (layer.index, sum(index == layer.index for index, _ in pass_.records))
    gradient = pass_.leaves is not None
    grouping, moments = _group(pass_, layer, slot, replace(call, input=call.input.detach()) if gradient else call)
    by_batch = call.training or call.running_mean is None or layer.index in pass_.by_batch
    per_image = pass_.per_image and not by_batch
    mean, variance = pool_moments(*moments, 1 if per_image else grouping.batch_size)
    values = call.input.numel() // call.input.shape[1] // grouping.groups
    size = call.input.numel() * call.input.element_size()
    unit = 1 if per_image else pass_.batch_size
    pass_.records[slot] = Recorded(mean, variance, unit, values, by_batch, size)
    if by_batch:
        call = replace(call, r_max=1.0, d_max=0.0, gate=None) if pass_.plain else call
        if gradient:
            return normalize_together(call)
        return normalize(call, mean, variance, grouping.group_of_row(call.input.device))
    call = _with_statistics(call, pass_.statistics.get(layer.index))
    if pass_.leaves is None:
        return family.evaluate(call)
    output, pass_.leaves[slot] = affine(call, replace(grouping, batch_size=1) if per_image else grouping)
    return output


def _with_statistics(call: NormCall, statistics: tuple[Tensor, Tensor] | None) -> NormCall:
    """The call as it were with other values in the buffers, in the buffers' own dtype."""
    if statistics is None or call.running_mean is None or call.running_variance is None:
        return call
    mean, variance = statistics
    return replace(call, running_mean=mean.to(call.running_mean), running_variance=variance.to(call.running_variance))


def _group(pass_: Pass, layer: ProbedLayer, slot: Slot, call: NormCall) -> tuple[Grouping, Moments]:
    """The grouping of a call's rows, and the moments of its images."""
    rows = call.input.shape[0]
    if rows % pass_.images:
        if pass_.images != pass_.batch_size or pass_.per_image:
            raise CannotEmulateError(f"{layer.name} sees {rows} rows for {pass_.images} images")
        # A real micro-batch: all rows are normalized together, whatever they are.
        whole = Grouping(images=1, batch_size=1, rows=rows)
        return whole, whole.image_moments(call.input, call.eps)
    grouping = Grouping(pass_.images, pass_.batch_size, rows, pass_.layouts.get(slot, Layout.CONSECUTIVE))
    moments = grouping.image_moments(call.input, call.eps)
    if slot in pass_.references and grouping.rows_per_image > 1:
        other = replace(grouping, layout=Layout.INTERLEAVED)
        others = other.image_moments(call.input, call.eps)
        mean, variance = pass_.references[slot]
        errors = [
            distance(*pool_moments(*candidate, grouping.batch_size), mean, variance, call.eps)
            for candidate in (moments, others)
        ]
        if errors[1] < errors[0]:
            pass_.layouts[slot] = Layout.INTERLEAVED
            return other, others
    return grouping, moments


def _calling_line() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library_file(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "unknown place"

"""Find, by running one micro-batch, the norms that no class gives away.

These are modules that give buffers of their own to ``F.batch_norm``, known by the memory of the statistics that a call
is given, and modules that normalize by arithmetic of their own, known by what they do: ``bnprobe.measure.recognition``.
A module that writes two buffers of one size in train mode, as a norm does, and is recognised by neither is listed with
the line that would name its buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.config.spec import NormClass
from bnprobe.measure.batch import map_leaves, tensors_of
from bnprobe.measure.hooks import Intercepted, Watch, calling_line, why_outside
from bnprobe.measure.layers import LayerSet, NamedModule, ProbedLayer, named_once
from bnprobe.measure.norms import (
    FROZEN,
    FunctionFamily,
    NormCall,
    NormFamily,
    Place,
    WholeModule,
    family_of,
    place_of,
)
from bnprobe.measure.recognition import Inputs, own_tensors, recognise
from bnprobe.measure.restore import preserved_random_state
from bnprobe.numbers import joined
from bnprobe.records import SkippedLayer


def explore(
    model: nn.Module,
    known: LayerSet,
    run: Callable[[bool, Watch], None],
    is_selected: Callable[..., bool],
    classes: Mapping[str, NormClass] | None = None,
) -> LayerSet:
    """The layers of a model, with those found by running it.

    Args:
        model: The caller puts its state back.
        known: The layers of known families.
        run: Runs the model on a micro-batch, in train mode if True, and lets the watch see its calls; it may raise.
        is_selected: Called with all names of a layer: whether it is in the report.
        classes: What the user says of norms of their own, by the name of the class.
    """
    modules = named_once(model)
    watch = _Watch([named.module for named in modules], known)
    with preserved_random_state(), torch.no_grad():
        for training in (True, False):
            # What a pass raises is raised again, and said, when the model is measured.
            with watch.running(training), suppress(Exception):
                run(training, watch)
    skipped = {layer.name: layer for layer in known.skipped}
    refused = {id(named.module) for named in modules if named.name in skipped and family_of(named.module) is not None}
    found = [each for each in _functions(modules, watch.calls, watch.counters) if id(each.module) not in refused]
    taken = {*(id(layer.module) for layer in known.layers), *(id(each.module) for each in found), *refused}
    for named in modules:
        if id(named.module) in taken or named.module not in watch.inputs:
            continue
        outcome = recognise(named.module, watch.inputs[named.module], watch.written[named.module], classes or {})
        if isinstance(outcome, WholeModule):
            found.append(_Found(named.name, named.aliases, named.module, outcome))
        elif named.name not in skipped or skipped[named.name].reason.startswith("unknown norm"):
            skipped[named.name] = SkippedLayer(named.name, named.kind, outcome)
    recognised = {id(each.module) for each in found}
    for named in modules:
        if id(named.module) not in taken | recognised and named.name not in skipped and named.module in watch.moved:
            skipped[named.name] = SkippedLayer(
                named.name, named.kind, _UNKNOWN.format(joined(watch.moved[named.module]))
            )
    for named in modules:
        if id(named.module) in refused:
            continue
        if id(named.module) in recognised:
            skipped.pop(named.name, None)
        elif named.name in skipped and any(_within(named.module, call.running_mean) for call in watch.calls):
            skipped[named.name] = SkippedLayer(named.name, named.kind, FROZEN, agrees=True)
    layers = [_as_called(layer, watch) for layer in known.layers]
    layers += [
        ProbedLayer(0, each.name, each.aliases, each.module, each.family, each.family.describe(each.module), True)
        for each in found
    ]
    order = {id(named.module): position for position, named in enumerate(modules)}
    layers.sort(key=lambda layer: order[id(layer.module)])
    layers = [
        replace(layer, index=index, selected=is_selected(layer.name, *layer.aliases))
        for index, layer in enumerate(layers)
    ]
    if not layers:  # else the scan itself lists such calls
        skipped |= {place: SkippedLayer(place, "batch_norm", reason) for place, reason in sorted(watch.outside)}
    return LayerSet(tuple(layers), tuple(skipped.values()))


_UNKNOWN = (
    "training changes its {}, as it does running statistics of one value per channel, but it does not do what a known"
    " norm does"
)


def _as_called(layer: ProbedLayer, watch: _Watch) -> ProbedLayer:
    """A layer with what its calls say, where that differs from its attributes."""
    calls = watch.of_layers.get(place_of(layer.info.running_mean) or (0, 0, 0), [])
    info = layer.info
    if calls:
        info = replace(info, eps=calls[0].eps)
    training = next((call for call in calls if call.training), None)
    if training is not None and training.momentum is not None and info.momentum is not None:
        info = replace(info, momentum=training.momentum)
    if training is not None and "num_batches_tracked" not in watch.counters.get(layer.module, ()):
        info = replace(info, batches_tracked=None)
    return replace(layer, info=info)


@dataclass(frozen=True)
class _Found:
    """A norm that is no layer of a known family."""

    name: str
    aliases: tuple[str, ...]
    module: nn.Module
    family: NormFamily


class _Watch:
    """Sees calls of ``F.batch_norm`` on statistics of no known layer, and what is written into which module.

    Attributes:
        calls: Those calls.
        of_layers: The calls on statistics of known layers, by their place.
        inputs: Of modules that may be norms of their own, in train mode.
        written: For these, the names of the tensors that the pass in train mode changed.
        counters: For every module, the names of its numbers that the pass counted up.
        moved: The names of the buffers, one value per channel of the input, that the pass in train mode changed, of
            modules that are none of torch's own.
        outside: Calls on the statistics of the batch alone: the place in the user's code, and why it is no layer.
    """

    def __init__(self, modules: Sequence[nn.Module], known: LayerSet) -> None:
        self.calls: list[NormCall] = []
        self.of_layers: dict[tuple[int, int, int], list[NormCall]] = {}
        self.inputs: dict[nn.Module, Inputs] = {}
        self.written: dict[nn.Module, tuple[str, ...]] = {}
        self.counters: dict[nn.Module, tuple[str, ...]] = {}
        self.moved: dict[nn.Module, tuple[str, ...]] = {}
        self.outside: set[tuple[str, str]] = set()
        self._channels: dict[nn.Module, set[int]] = {}
        self._places = {place_of(layer.info.running_mean) for layer in known.layers}
        layers = {layer.module for layer in known.layers}
        self._every = modules
        self._modules = [module for module in modules if module not in layers and not _is_torchs(module)]

    def unknown(self, call: NormCall, run: Callable[[], Tensor]) -> Tensor:
        """Take note of a call of no known layer, and make it."""
        if not self._note(call) and call.training:
            self.outside.add((calling_line(), why_outside(call)))
        try:
            return run()
        except ValueError:  # one value per channel, which training refuses and a scan takes for 0
            return torch.zeros_like(call.input)

    def known(self, found: Intercepted) -> None:
        """Take note of a call of a known layer."""
        self._note(found.call)

    def _note(self, call: NormCall) -> bool:
        """Take note of a call by the memory of its running mean; False where it has none."""
        place = place_of(call.running_mean)
        if place is not None:
            into = self.of_layers.setdefault(place, []) if place in self._places else self.calls
            into.append(replace(call, input=call.input[:0].detach()))
        return place is not None

    @contextmanager
    def running(self, training: bool) -> Iterator[None]:
        """Watch one pass."""
        if not training:
            yield
            return
        seen = [module for module in self._modules if not isinstance(module, torch.jit.ScriptModule)]  # takes no hooks
        candidates = [module for module in seen if len(_statistics_like(module)) > 1]
        before = {module: _copies(module) for module in self._every}
        others = [module for module in self._modules if _buffers_like_statistics(module)]
        with ExitStack() as stack:
            for module in others:
                stack.callback(module.register_forward_pre_hook(self._note_channels).remove)
            for module in candidates:
                stack.callback(module.register_forward_pre_hook(self._note_inputs, with_kwargs=True).remove)
            yield
        for module, kept in before.items():
            after = own_tensors(module)
            self.counters[module] = tuple(
                name
                for name, value in kept.items()
                if name in after and value.numel() == after[name].numel() == 1 and _counts_up(value, after[name])
            )
        for module in others:
            after, kept, channels = _buffers_like_statistics(module), before[module], self._channels.get(module, set())
            changed = [name for name in after if name in kept and not _same(after[name], kept[name])]
            if moved := tuple(name for name in changed if after[name].numel() in channels):
                self.moved[module] = moved
        for module in candidates:
            after, kept = _statistics_like(module), before[module]
            changed = [name for name in after if name in kept and not torch.equal(after[name], kept[name])]
            sizes = [after[name].numel() for name in changed]
            self.written[module] = tuple(name for name in changed if sizes.count(after[name].numel()) > 1)
            if not self.written[module]:
                self.inputs.pop(module, None)

    def _note_channels(self, module: nn.Module, args: Any) -> None:
        inputs = [leaf for leaf in tensors_of(args) if leaf.dim() > 1]
        self._channels[module] = {inputs[0].shape[1], inputs[0].shape[-1]} if inputs else set()

    def _note_inputs(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module not in self.inputs:
            args, kwargs = map_leaves((args, kwargs), lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
            self.inputs[module] = Inputs(args, kwargs)


def _is_torchs(module: nn.Module) -> bool:
    """Whether the class is one of torch's own, as that of spectral norm, which keeps vectors of a weight."""
    return type(module).__module__.startswith("torch.")


def _copies(module: nn.Module) -> dict[str, Tensor]:
    small = {name: value for name, value in own_tensors(module).items() if value.numel() <= 2**16}
    return {name: value.detach().clone() for name, value in small.items()}


def _statistics_like(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that may be the statistics of channels."""
    return {
        name: value
        for name, value in own_tensors(module).items()
        if value.is_floating_point() and 1 < value.numel() <= 2**16 and value.numel() == max(value.shape)
        if _has_memory(value)
    }


def _has_memory(value: Tensor) -> bool:
    """Whether a tensor's values can be read: a model may have freed the memory of one, and reading it would crash."""
    if value.is_meta or value.layout is not torch.strided:
        return False
    span = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.untyped_storage().nbytes() >= (value.storage_offset() + span) * value.element_size()


def _buffers_like_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Those that are registered as buffers."""
    names = {name for name, _ in module.named_buffers(recurse=False)}
    return {name: value for name, value in _statistics_like(module).items() if name in names}


def _counts_up(before: Tensor, after: Tensor) -> bool:
    added = float(after) - float(before)
    return 1 <= added < 2**16 and added.is_integer()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def possible_norms(model: nn.Module, found: LayerSet) -> list[SkippedLayer]:
    """Modules of no known family with two buffers of one size, as a norm has them; whether they are norms shows only
    when the model runs.
    """
    known = {*(layer.name for layer in found.layers), *(layer.name for layer in found.skipped)}
    possible: list[SkippedLayer] = []
    for named in named_once(model):
        sizes = {name: value.numel() for name, value in _buffers_like_statistics(named.module).items()}
        alike = [name for name, size in sizes.items() if list(sizes.values()).count(size) > 1]
        if alike and not _is_torchs(named.module) and named.name not in known:
            possible.append(SkippedLayer(named.name, named.kind, _NOT_RUN.format(joined(alike))))
    return possible


_NOT_RUN = "its buffers {} may be running statistics"


def _functions(
    modules: Sequence[NamedModule], calls: Sequence[NormCall], counters: Mapping[nn.Module, tuple[str, ...]]
) -> list[_Found]:
    """The modules whose buffers calls were given that normalize with their batch; a buffer's rows are layers each."""
    found: dict[tuple[str, str, int], _Found] = {}
    for call in (call for call in calls if call.training):
        for named in modules:
            mean, variance = (_within(named.module, each) for each in (call.running_mean, call.running_variance))
            if mean is None or variance is None:
                continue
            total = own_tensors(named.module)[mean.attribute].numel()
            starts = range(0, total, mean.channels) if mean.start % mean.channels == 0 == total % mean.channels else ()
            counter = next(iter(counters.get(named.module, ())), None)
            for start in starts if len(starts) > 1 and variance.start == mean.start else (mean.start,):
                shifted = replace(variance, start=variance.start + start - mean.start)
                family = FunctionFamily(
                    replace(mean, start=start), shifted, call.eps, call.momentum, counter if len(starts) == 1 else None
                )
                key = (named.name, mean.attribute, start)
                row = f"[{start // mean.channels}]" if len(starts) > 1 else ""
                if key not in found:
                    found[key] = _Found(
                        f"{named.name}{row}", tuple(f"{each}{row}" for each in named.aliases), named.module, family
                    )
            break
    return _told_apart(list(found.values()))


def _told_apart(found: list[_Found]) -> list[_Found]:
    """Where one module has several statistics of its own, their names say which."""
    names = [each.name for each in found]
    return [
        each
        if names.count(each.name) == 1 or not isinstance(each.family, FunctionFamily)
        else replace(each, name=f"{each.name}.{each.family.mean.attribute}", aliases=())
        for each in found
    ]


def _within(module: nn.Module, part: Tensor | None) -> Place | None:
    """The tensor of a module that a part is a view of, and where in it."""
    place = place_of(part)
    if place is None or part is None or not part.is_contiguous():
        return None
    storage, offset, channels = place
    for name, tensor in own_tensors(module).items():
        whole = place_of(tensor)
        if whole is None or whole[0] != storage or not tensor.is_contiguous():
            continue
        start = offset - whole[1]
        if start >= 0 and start + channels <= whole[2]:
            return Place(name, channels, start)
    return None

"""One batch of a training run, looked at in both modes, with the model as it stands."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.config.spec import ScanSettings
from bnprobe.loading.model import unwrapped
from bnprobe.loading.samples import count_samples_of_call
from bnprobe.measure.batch import tensors_of
from bnprobe.measure.forward_pass import Pass, Recorded, Slot, corrections_of
from bnprobe.measure.interrupts import Restore, Restoring
from bnprobe.measure.keepers import keep_structure, keep_values, set_flag
from bnprobe.measure.layers import LayerSet, ProbedLayer, find_layers
from bnprobe.measure.norms import family_of
from bnprobe.measure.outputs import floating, square_norm
from bnprobe.measure.reach import every_module, reached
from bnprobe.measure.restore import preserved_random_state, preserved_settings
from bnprobe.measure.session import Session, UserFunctions
from bnprobe.nn.frozen import FrozenBatchNorm
from bnprobe.stats.moments import Corrections, Moments, pool_moments, row_moments

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What the model is called with: positional and keyword arguments."""


def call_model(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model as the loop did: ``forward(model, batch)`` of a batch that holds all arguments."""
    args, kwargs = inputs
    return model(*args, **kwargs)


class Hook:
    """A hook on the model; of a copy or a saved one nothing is left but a function that does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *given: Any) -> None:
        self._function(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


FIGURES = 6
"""Of each layer, in a look."""

_SMALL = 2**20
"""Tensors beside the model with more values are not put back after a look."""

_RECENT, _ENOUGH = 10, 5
"""Looks whose batches stand in for the running statistics of a layer that was frozen, and how many are needed."""

TOGETHER = 64
"""Samples that are taken together at a layer in eval mode: the noise of small batches does it no harm, and hides what
does."""


@dataclass(frozen=True)
class Look:
    """What both modes do to one batch; tensors on the device, which nothing has waited for.

    Attributes:
        samples: In the batch; None where that is not known.
        layers: Names of the layers with running statistics that the batch passed through, in network order.
        frozen: Of these, those that training holds in eval mode, which do not normalize with the batch.
        figures: A row for each of them, float64, shape (layers, 6): D, as of BN without a correction, of the batch
            against the running statistics as they were before the step; what i.i.d. batches that vary as the samples of
            this one do would have; the means of r and of d squared; the updates of the running statistics so far, NaN
            where they are not counted; and D against running statistics that had gone on, which is D itself but for
            layers that the monitor froze, and NaN until that is known. Of layers that training holds in eval mode that
            last one is D of the last ``TOGETHER`` samples or more, and NaN where there are not as many new ones.
        distance: |y_train - y_eval|^2 and |y_eval|^2 over all outputs, float64, shape (2,); NaN where they differ in
            form.
        eval: What the model returned in eval mode; None where that is not known.
    """

    samples: int | None
    layers: tuple[str, ...]
    frozen: frozenset[str]
    figures: Tensor
    distance: Tensor
    eval: Any


class Sampler:
    """Looks at batches of one model.

    Args:
        model: Wrappers of DDP and torch.compile are taken off.
        settings: Which layers are looked at.

    Attributes:
        model: The module inside the wrappers.
        layers: Its norm layers.
    """

    def __init__(self, model: nn.Module, settings: ScanSettings) -> None:
        self.model, _ = unwrapped(model)
        self.layers: LayerSet = find_layers(self.model, settings.is_selected)
        # Not the root, nor what plain lists hold.
        self._registered = dict(self.model.named_modules(remove_duplicate=False)).keys()
        self._settings = settings
        self._changed: frozenset[str] = frozenset()
        self._recent: dict[str, deque[Moments]] = {}

    def follow(self, names: Iterable[str], changed: bool) -> None:
        """Take the layers of these names to be those that now stand in their places, converted ones or not."""
        modules = {name: self.model.get_submodule(name) for name in names}
        self._changed = self._changed | modules.keys() if changed else self._changed - modules.keys()
        layers = [
            replace(layer, module=modules[layer.name], family=family_of(modules[layer.name]) or layer.family)
            if layer.name in modules
            else layer
            for layer in self.layers.layers
        ]
        self.layers = replace(self.layers, layers=tuple(layers))
        for name in modules:
            self._recent.pop(name, None)

    def find_again(self) -> list[str]:
        """Take the layers that now stand in the places of others; the names of those in whose place none stands."""
        now = dict(self.model.named_modules(remove_duplicate=False))
        own = [layer for layer in self.layers.layers if layer.name in self._registered]
        moved = [layer.name for layer in own if now.get(layer.name) is not layer.module]
        gone = [name for name in moved if name not in now or family_of(now[name]) is None]
        self.layers = replace(self.layers, layers=tuple(each for each in self.layers.layers if each.name not in gone))
        self.follow((name for name in moved if name not in gone), changed=False)
        return gone

    def look(self, inputs: Inputs, in_eval: Inputs | None) -> Look:
        """Run the model on a batch in both modes; it comes back as it was, and so does the random state.

        Must be called where the loop calls the model, so that its autocast is in force.

        Args:
            inputs: As the loop calls the model.
            in_eval: The same in eval mode, where they come from earlier calls of the model; None where they do, and are
                not known: what the model returns in eval mode is not known either.

        Raises:
            UserCodeError: The model raised.
        """
        samples = count_samples_of_call(*inputs)
        size = samples or 1
        tensors = tensors_of(list(inputs))
        device = tensors[0].device if tensors else torch.device("cpu")
        # Their statistics are those of now: the buffers may have been replaced.
        layers = tuple(replace(layer, info=layer.family.describe(layer.module)) for layer in self.layers.layers)
        found = replace(self.layers, layers=layers)
        training, evaluated = Pass(size, size), Pass(size, size, per_sample=samples is not None)
        with ExitStack() as kept:
            for each in (preserved_random_state(), self.held(), preserved_settings(self.model)):
                kept.enter_context(each)
            kept.enter_context(_preserved_by_hooks(self.model))
            kept.enter_context(_without_autocast_cache())
            session = Session(self.model, found, UserFunctions(forward=call_model), device, settings=self._settings)
            kept.enter_context(session.installed())
            with self._recording_frozen(training):
                trained = session.forward("train", inputs, training)[0]
            other = session.forward("eval", inputs if in_eval is None else in_eval, evaluated)[0]
        frozen = {layer.name for layer in found.selected if layer.index in session.frozen} - self._changed
        self._recent = {name: each for name, each in self._recent.items() if name in frozen | self._changed}
        names, rows = [], []
        for layer in found.selected:
            row = self._row(layer, training.records, evaluated.records, size, layer.name in frozen)
            if row is not None:
                names.append(layer.name)
                rows.append(row)
        figures = torch.stack(rows) if rows else torch.empty(0, FIGURES, dtype=torch.float64)
        distance, known = _distance(trained, other), None if in_eval is None else other
        return Look(samples, tuple(names), frozenset(frozen), figures, distance, known)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Where training holds the whole model in eval mode, let that be said of what is in it: the root trains."""
        training = self.model.training
        set_flag(self.model, True)
        try:
            yield
        finally:
            set_flag(self.model, training)

    @contextmanager
    def _recording_frozen(self, pass_: Pass) -> Iterator[None]:
        """Record the moments of the layers that were frozen, which a session does not see: they use none."""
        frozen = [layer for layer in self.layers.layers if isinstance(layer.module, FrozenBatchNorm)]

        def hook(layer: ProbedLayer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def record(module: nn.Module, given: tuple[Tensor, ...]) -> None:
                x = given[0].detach()
                rows, size = x.shape[0], pass_.batch_size
                moments = row_moments(x, layer.info.eps)
                if rows != size:
                    moments = pool_moments(*moments, rows)
                unit, values = 1 if rows == size else size, x.numel() // x.shape[1]
                pass_.records[layer.index, 0] = Recorded(*moments, unit, values, by_batch=False, bytes=0, rows=rows)

            return record

        with ExitStack() as hooks:
            for layer in frozen:
                hooks.callback(layer.module.register_forward_pre_hook(hook(layer)).remove)
            yield

    def _row(
        self,
        layer: ProbedLayer,
        trained: Mapping[Slot, Recorded],
        evaluated: Mapping[Slot, Recorded],
        size: int,
        frozen: bool,
    ) -> Tensor | None:
        """A row of figures, the mean over the calls of a layer; None without calls or running statistics."""
        calls = [record for (index, _), record in trained.items() if index == layer.index]
        if not calls or layer.info.running_mean is None or layer.info.running_variance is None:
            return None
        converted = layer.name in self._changed and not calls[0].by_batch
        recent = self._recent_statistics(layer, calls[0], size) if converted else None
        samples = calls if recent else [record for (index, _), record in evaluated.items() if index == layer.index]
        values = [corrections_of(record, layer, size) for record in calls]
        noise = [_noise(record, recent or layer) for record in samples if record.unit == 1 < size]
        mismatch = torch.stack([_uncorrected(each) for each in values]).mean()
        tracked = getattr(layer.module, "num_batches_tracked", None)
        unknown = mismatch.new_full((), torch.nan)
        if frozen:
            together = self._together(layer, calls[0], size)
            gone_on = unknown if together is None else _uncorrected(corrections_of(together, layer, size))
        elif recent is not None:
            gone_on = _uncorrected(corrections_of(calls[0], recent, size))
        else:
            gone_on = unknown if converted else mismatch
        parts = [
            mismatch,
            torch.stack(noise).mean() if noise else mismatch.new_zeros(()),
            torch.stack([each.r.mean() for each in values]).mean(),
            torch.stack([each.d.square().mean() for each in values]).mean(),
            tracked.double() if isinstance(tracked, Tensor) else unknown,
            gone_on,
        ]
        return torch.stack([part.to(mismatch) for part in parts])

    def _together(self, layer: ProbedLayer, record: Recorded, size: int) -> Recorded | None:
        """The last batches at a layer as if they were one, each of them once: what is tested may not overlap."""
        recent = self._recent.setdefault(layer.name, deque())
        recent.append(record.per_group(size))
        if len(recent) * size < TOGETHER:
            return None
        self._recent.pop(layer.name)
        mean, variance = (torch.cat(each) for each in zip(*recent, strict=True))
        mean, variance = pool_moments(mean, variance, len(mean))
        return replace(record, mean=mean, variance=variance, unit=size, groups=None, values=record.values * len(recent))

    def _recent_statistics(self, layer: ProbedLayer, record: Recorded, size: int) -> ProbedLayer | None:
        """A frozen layer as if its running statistics were those of the last batches that were looked at."""
        recent = self._recent.setdefault(layer.name, deque(maxlen=_RECENT))
        known = list(recent)
        recent.append(record.per_group(size))
        if len(known) < _ENOUGH:
            return None
        mean, variance = (torch.stack(each).mean((0, 1)) for each in zip(*known, strict=True))
        return replace(layer, info=replace(layer.info, running_mean=mean, running_variance=variance))


def _uncorrected(values: Corrections) -> Tensor:
    """D of plain BN, whatever the layer corrects: d^2 + rho (r - 1)^2, the mean over channels."""
    return (values.d.square() + values.rho * (values.r - 1).square()).mean()


def _noise(record: Recorded, layer: ProbedLayer) -> Tensor:
    """D of batches of as many samples that are drawn at random from where these come from, to first order.

    The batch mean is the mean of the samples' means, and the batch variance that of v_i + (m_i - mu)^2, to first order
    in the deviations; the variance of a mean of N values is theirs, unbiased, over N. r - 1 is half the relative error
    of the variance.
    """
    assert layer.info.running_variance is not None
    mean, variance = record.mean, record.variance
    spread = variance + (mean - mean.mean(0)).square()
    scale = layer.info.running_variance.to(mean) + layer.info.eps_of_channels.to(mean)
    shift = mean.var(0) / mean.shape[0] / scale
    stretch = spread.var(0) / mean.shape[0] / (2 * scale).square()
    return (shift + stretch).mean()


def _distance(one: Any, other: Any) -> Tensor:
    pairs = list(zip(floating(one), floating(other), strict=False))
    if not pairs or any(left.shape != right.shape for left, right in pairs):
        return torch.full((2,), torch.nan, dtype=torch.float64)
    difference = torch.stack([square_norm(left - right) for left, right in pairs]).sum()
    return torch.stack([difference, torch.stack([square_norm(right) for _, right in pairs]).sum()])


def _preserved_by_hooks(model: nn.Module) -> Restoring:
    """Restore what the user's hooks on modules write into: lists, attributes and small tensors beside the model."""
    hooks = [
        hook for each in model.modules() for hook in (*each._forward_pre_hooks.values(), *each._forward_hooks.values())
    ]
    hooks = [hook for hook in hooks if not type(hook).__module__.startswith("bnprobe.")]

    def save() -> list[Restore]:
        own = {id(item) for _, item in reached(every_module(model), functions=False)}
        found = [each.item for each in reached({"": hooks}) if id(each.item) not in own] if hooks else []
        small = [item for item in found if not isinstance(item, Tensor) or item.numel() <= _SMALL]
        values = [restore for item in small if (restore := keep_values(item)) is not None]
        return [*(restore for item in found for restore in keep_structure(item)), *values]

    return Restoring(save)


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Keep the weights that autocast casts without a graph from the loop, which would train them no more."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)

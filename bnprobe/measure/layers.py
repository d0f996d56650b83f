"""Find the norm layers of a model, and describe their settings."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from bnprobe.config.spec import ScanSettings, matches_any
from bnprobe.errors import NothingToProbeError
from bnprobe.loading.model import user_code
from bnprobe.measure.norms import FROZEN, NormFamily, NormInfo, family_of, lookalike_reason, place_of
from bnprobe.measure.origins import by_name, origin
from bnprobe.measure.reach import every_module
from bnprobe.measure.restore import held_in_eval, preserved_settings, set_mode
from bnprobe.numbers import count
from bnprobe.records import ROOT, SkippedLayer
from bnprobe.rules.facts import Anatomy
from bnprobe.wording import nearest, option

ONE_VALUE = "one value per channel in a micro-batch: training raises an error at this batch size"
"""A note on a layer."""


@dataclass(frozen=True)
class NamedModule:
    """A module and all its names; ``name`` is the first, as in reports."""

    name: str
    aliases: tuple[str, ...]
    module: nn.Module

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    @property
    def kind(self) -> str:
        return type(self.module).__name__


def named_once(model: nn.Module) -> list[NamedModule]:
    """Every module once, in network order; those that plain containers hold come last."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name or ROOT)
    for name, module in every_module(model).items():
        names.setdefault(module, [name])
    return [NamedModule(found[0], tuple(found[1:]), module) for module, found in names.items()]


@dataclass(frozen=True)
class ProbedLayer:
    """A layer of a known family.

    Attributes:
        index: Position among the probed layers, in the order of ``named_modules``.
        name: First qualified name; ``aliases`` holds the others of a shared module.
        selected: False if --include/--exclude leave it out of the report; it still normalizes per micro-batch.
    """

    index: int
    name: str
    aliases: tuple[str, ...]
    module: nn.Module
    family: NormFamily
    info: NormInfo
    selected: bool

    @cached_property
    def unusable(self) -> str | None:
        """Why nothing can be compared with its running statistics, a clause; None where it can, or it keeps none."""
        bad, negative = bad_statistics(self.info)
        words = [count(bad, "NaN or Inf value")] if bad else []
        words += [count(negative, "negative variance")] if negative else []
        return f"its running statistics hold {' and '.join(words)}" if words else None


def bad_statistics(info: NormInfo) -> tuple[int, int]:
    """How many values of the running statistics are NaN or Inf, and how many variances are negative."""
    mean, variance = info.running_mean, info.running_variance
    bad = sum(int((~torch.isfinite(each)).sum()) for each in (mean, variance) if each is not None)
    return bad, 0 if variance is None else int((variance < 0).sum())


@dataclass(frozen=True)
class LayerSet:
    """All layers of a model."""

    layers: tuple[ProbedLayer, ...]
    skipped: tuple[SkippedLayer, ...]

    @property
    def selected(self) -> tuple[ProbedLayer, ...]:
        return tuple(layer for layer in self.layers if layer.selected)


def find_layers(model: nn.Module, is_selected: Callable[..., bool], *, required: bool = True) -> LayerSet:
    """List the model's norm layers in network order, each shared module once.

    Args:
        model: Any module.
        is_selected: Called with all names of a layer: whether it is in the report.
        required: Refuse a model without any.

    Raises:
        NothingToProbeError: No layer can be probed, or none is selected.
    """
    layers: list[ProbedLayer] = []
    skipped: list[SkippedLayer] = []
    for named in named_once(model):
        module = named.module
        family = family_of(module)
        reason = family.obstacle(module) if family else lookalike_reason(module)
        if reason:
            agrees = reason in (FROZEN, getattr(module, "nothing_to_measure", None))
            skipped.append(SkippedLayer(named.name, named.kind, reason, agrees))
        elif family:
            selected = is_selected(*named.names)
            info = family.describe(module)
            layers.append(ProbedLayer(len(layers), named.name, named.aliases, module, family, info, selected))
    found = LayerSet(tuple(layers), tuple(skipped))
    if required:
        require_layers(model, found)
    return found


def unmatched_globs(settings: ScanSettings, found: LayerSet) -> tuple[str, ...]:
    """One sentence for each glob of the settings that matches no layer, probably because of a typo."""
    names = [name for layer in found.layers for name in (layer.name, *layer.aliases)]
    names += [layer.name for layer in found.skipped]
    globs = [(option("--include"), glob) for glob in settings.include]
    globs += [(option("--exclude"), glob) for glob in settings.exclude]
    globs += [("rules.exempt", exemption.layers) for exemption in settings.rules.exempt]
    globs += [("thresholds", glob) for glob in settings.thresholds if glob != "*"]
    return tuple(_unmatched(glob, origin, names) for origin, glob in globs if not matches_any(glob, names))


def _unmatched(glob: str, origin: str, names: list[str]) -> str:
    near = nearest(glob, names, cutoff=0.0)
    hint = f'; the nearest name is "{near}"' if near else ""
    return f'The glob "{glob}" of {origin} matches no layer{hint}.'


def require_layers(model: nn.Module, found: LayerSet) -> None:
    """Refuse a model in which there is nothing to measure.

    Raises:
        NothingToProbeError: No layer can be probed, or none is selected.
    """
    if found.selected:
        return
    kind = type(model).__name__
    if found.layers:
        raise NothingToProbeError(
            f"{option('--include')}/{option('--exclude')} exclude every BN layer of {kind}"
            f" ({len(found.layers)} in all);"
            f" the first is named {found.layers[0].name!r}."
        )
    if found.skipped:
        first = found.skipped[0]
        raise NothingToProbeError(
            f"No layer of {kind} can be measured: every layer was skipped ({len(found.skipped)} in all)."
            f" The first is {first.name} ({first.kind}): {first.reason}."
        )
    raise NothingToProbeError(f"{kind} has no Batch Normalization layer: there is nothing to probe.")


_ENOUGH_CHANNELS = 8
"""Values of fewer channels may be round by chance."""

_CONSTANT = 1e-4
"""A channel with a smaller part of eps as its variance has a standard deviation below 1% after the layer."""

_ENOUGH_WEIGHTS = 512
"""Fewer weights may have few values by chance."""

_SEEN, _MANY_LEVELS = 2048, 1024
"""Where so many of the first weights differ, they were not quantized to eight bits."""

_RANDOM_KIND = re.compile(r"drop_?path|stochastic_?depth|drop_?block", re.IGNORECASE)
"""Random layers that torch does not have; every library has its own."""

_PROBABILITIES = ("drop_prob", "p", "prob", "drop_path", "drop_rate")
"""What they call their probability."""


def anatomy(
    layers: LayerSet | Sequence[ProbedLayer], model: nn.Module, held: Sequence[nn.Module] | None = None
) -> tuple[Anatomy, ...]:
    """Describe the layers (of a set: those selected), in network order. The model's flags come back as they were.

    Args:
        layers: Found in ``model``.
        model: Its flags are read as they are after ``model.train()``.
        held: Modules that the user keeps in eval mode while training; None: those that are in eval mode now, beside a
            root in train mode.

    Raises:
        UserCodeError: The model's own train() raised.
    """
    chosen = layers.selected if isinstance(layers, LayerSet) else layers
    with _as_in_training(model, held):
        before, weights, copies = _random_layers_before(model), _weights_before(model), _copies(model)
        names = by_name(model)
        described = [_describe(layer, names, before.get(id(layer.module), ())) for layer in chosen]
        return tuple(
            replace(
                one,
                **_of_weights(weights.get(id(layer.module))),
                copy_of=next((copies[name] for name in copies if _is_part(layer.name, name)), None),
            )
            for one, layer in zip(described, chosen, strict=True)
        )


@contextmanager
def _as_in_training(model: nn.Module, held: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """Set the flags as training does; what the user keeps in eval mode stays so."""
    with preserved_settings(model):
        with user_code("calling train() of the model"):
            set_mode(model, True, held_in_eval(model) if held is None else held)
        yield


def _describe(layer: ProbedLayer, names: Mapping[str, nn.Module], before: tuple[str, ...]) -> Anatomy:
    mean, variance = layer.info.running_mean, layer.info.running_variance
    statistics = {place_of(mean), place_of(variance)}  # which may be kept as parameters
    parameters = [each for each in layer.module.parameters(recurse=False) if place_of(each) not in statistics]
    affine = [parameter.requires_grad for parameter in parameters]
    buffers = [buffer for buffer in (mean, variance) if buffer is not None]
    bad, negative = bad_statistics(layer.info)
    least = layer.info.eps**2 if layer.info.on_std else layer.info.eps
    untouched = mean is not None and variance is not None and bool((mean == 0).all()) and bool((variance == 1).all())
    return Anatomy(
        name=layer.name,
        location=origin(names, layer.name),
        kind=type(layer.module).__name__,
        channels=layer.info.channels,
        eps=layer.info.eps,
        momentum=layer.info.momentum,
        batches_tracked=layer.info.batches_tracked,
        has_running_statistics=mean is not None,
        trains_statistics=layer.module.training and mean is not None,
        trains_affine=any(affine) if affine else None,
        untouched=untouched,
        non_finite=bad,
        negative=negative,
        dead=_below(variance, least),
        constant=_below(variance, _CONSTANT * least),
        median_variance=_median(variance),
        dropouts_before=before,
        affine_moved=_has_moved(layer.module),
        bfloat16=_are_bfloat16(buffers),
    )


def _below(variance: Tensor | None, limit: float) -> int:
    """Number of variances that are below a limit."""
    return 0 if variance is None else int(((variance >= 0) & (variance < limit)).sum())


def _has_moved(module: nn.Module) -> bool | None:
    """Whether weight or bias differ from 1 and 0; None without them."""
    affine = [(getattr(module, name, None), start) for name, start in (("weight", 1.0), ("bias", 0.0))]
    known = [(value.detach(), start) for value, start in affine if isinstance(value, Tensor) and not is_lazy(value)]
    return any(bool((value != start).any()) for value, start in known) if known else None


def _are_bfloat16(buffers: Sequence[Tensor]) -> bool | None:
    """Whether bfloat16 holds every value of buffers that have more bits; None where that may be by chance.

    Few values may be round, and those of a new layer are.
    """
    values = [buffer.detach().float() for buffer in buffers]
    if not values or any(len(each) < _ENOUGH_CHANNELS or bool((each == each.round()).all()) for each in values):
        return None
    return all(bool((each == each.bfloat16().float()).all()) for each in values)


def _weights_before(model: nn.Module) -> dict[int, Tensor]:
    """For each module, the weights of the last layer with a matrix or kernel that is defined before it."""
    found: dict[int, Tensor] = {}
    last: Tensor | None = None
    for module in model.modules():
        if last is not None:
            found[id(module)] = last
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if isinstance(weight, Tensor) and not is_lazy(weight) and weight.dim() > 1:
            last = weight.detach()
    return found


def _of_weights(weight: Tensor | None) -> dict[str, Any]:
    """The fraction of zeros and the number of values; of few weights they say nothing."""
    if weight is None or weight.numel() < _ENOUGH_WEIGHTS:
        return {}
    return {"zeros": 1.0 - int(weight.count_nonzero()) / weight.numel(), "levels": _levels(weight)}


def _levels(weight: Tensor) -> int:
    """The number of different values; of the first values alone where these differ so much that nobody quantized them.

    Counting them all sorts every weight of the model, which takes longer than a forward pass.
    """
    first = int(weight.flatten()[:_SEEN].unique().numel())
    return first if first > _MANY_LEVELS else int(weight.unique().numel())


def _copies(model: nn.Module) -> dict[str, str]:
    """Modules without gradients that are copies of a module beside them, by name, with the name of that module."""
    found: dict[str, str] = {}
    for parent_name, parent in model.named_modules():
        if isinstance(parent, nn.Sequential | nn.ModuleList):
            continue  # blocks in a row are alike, and some may be frozen
        children = [
            (name, child, [p.requires_grad for p in child.parameters()]) for name, child in parent.named_children()
        ]
        frozen = [(name, child) for name, child, grads in children if grads and not any(grads)]
        if not frozen:
            continue
        trained = {_signature(child): name for name, child, grads in children if any(grads)}
        for name, child in frozen:
            if (other := trained.get(_signature(child))) is not None:
                prefix = f"{parent_name}." if parent_name else ""
                found[f"{prefix}{name}"] = f"{prefix}{other}"
    return found


def _signature(module: nn.Module) -> tuple[Any, ...]:
    return repr(module), tuple(
        (name, () if is_lazy(value) else tuple(value.shape)) for name, value in module.state_dict().items()
    )


def _is_part(layer: str, module: str) -> bool:
    return layer == module or layer.startswith(f"{module}.")


def _median(variance: Tensor | None) -> float | None:
    if variance is None or not bool(torch.isfinite(variance).all()):
        return None
    return float(variance.detach().double().median())


def has_random_layers(model: nn.Module, held: Sequence[nn.Module] | None = None) -> bool:
    """Whether a layer that is known to be random is active in training, whatever else draws random numbers.

    Args:
        model: As for ``anatomy``.
        held: As for ``anatomy``.
    """
    with _as_in_training(model, held):
        return any(module.training and probability_of_dropping(module) > 0 for module in model.modules())


def _random_layers_before(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """For each module, the names of the active random layers that feed it, where torch.fx can follow its forward.

    Otherwise of those that are defined before it.
    """
    found: dict[int, tuple[str, ...]] = {}
    names: tuple[str, ...] = ()
    for name, module in model.named_modules():
        found[id(module)] = names
        if module.training and probability_of_dropping(module) > 0:
            names = (*names, name or ROOT)
    # Symbolic execution runs the user's forward on placeholders; where nothing is random it is spared that.
    return (_followed(model) if names else None) or found


def _followed(model: nn.Module) -> dict[int, tuple[str, ...]] | None:
    """The random layers that feed each module in the traced graph; None where forward cannot be traced."""
    try:
        graph = traced(model)
    except Exception:  # whatever the user's forward does that a placeholder cannot
        return None
    feeding: dict[Any, tuple[str, ...]] = {}
    found: dict[int, tuple[str, ...]] = {}
    for node in graph.nodes:
        before = tuple(dict.fromkeys(name for source in node.all_input_nodes for name in feeding[source]))
        feeding[node] = before
        if node.op == "call_module":
            module = model.get_submodule(str(node.target))
            found[id(module)] = tuple(dict.fromkeys((*found.get(id(module), ()), *before)))
            if module.training and probability_of_dropping(module) > 0:
                feeding[node] = (*before, str(node.target))
    return found


def traced(model: nn.Module) -> Any:
    """The ``torch.fx`` graph of a model's forward, in which norms, random layers and convolutions are single nodes.

    The user's forward runs on placeholders, and may raise anything.
    """
    from torch import fx

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            known = isinstance(module, _ConvNd | nn.Linear) or family_of(module) is not None
            return known or probability_of_dropping(module) > 0 or super().is_leaf_module(module, name)

    return Tracer().trace(model)


def probability_of_dropping(module: nn.Module) -> float:
    """How likely a random layer drops something; 0 for any other module."""
    if isinstance(module, _DropoutNd):
        return float(module.p)
    if not _RANDOM_KIND.search(type(module).__name__):
        return 0.0
    given = (getattr(module, name, None) for name in _PROBABILITIES)
    return next((float(value) for value in given if isinstance(value, int | float)), 0.0)

"""Small measurements that tell causes apart, each on a few micro-batches and only where it can change what is said.

Do outputs depend on who else is in the batch? Would another eps fit the statistics? Is part of the data padding? Which
random layers feed a norm layer? What draws random numbers at inference?
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from bnprobe.errors import BnprobeError
from bnprobe.measure.batch import CannotEmulateError, MicroBatch, join, pick, tensors_of, to_device
from bnprobe.measure.forward_pass import Pass
from bnprobe.measure.layers import ProbedLayer, named_once, probability_of_dropping
from bnprobe.measure.outputs import floating, square_norm
from bnprobe.measure.physical_batch import Batching
from bnprobe.measure.restore import random_state
from bnprobe.measure.scores import run_together
from bnprobe.measure.session import Outputs, Session
from bnprobe.records import ROOT
from bnprobe.rules.facts import EXPLAINED, OtherEps, Padding, Randomness
from bnprobe.stats.moments import bessel

EPS = (1e-2, 1e-3, 1e-5, 1e-6, 1e-8)
"""The defaults of the frameworks, and values seen in public code."""

SAMPLES_OF_EPS = 128
"""Population statistics of so many samples show a factor between variances."""

SAMPLES_OF_HINT, _FEWEST_HINTING = 8, 2
"""So many samples, and so many micro-batches at least, show whether another eps may explain a mismatch."""

_HINT = 0.75
"""A part of a mismatch that may be less than ``EXPLAINED`` of it on more samples: the rest is noise of so few."""

_SAME_SCALE = 3e-4
"""An eps that changes the scale of no channel by more than this, relative, is not tried: it would change little."""

_SAME_INPUT = 1e-3
"""A mismatch that another eps changes by no more than this, relative, is of a layer whose input is the same with it."""


def batch_dependence(session: Session, micro_batches: Sequence[Any], sizes: Sequence[int]) -> float | None:
    """Relative L2 distance, on the eval path, of the outputs for the same samples in other batches.

    Pairs of micro-batches exchange half of their samples; batches of one sample are compared with batches of two.

    Returns:
        None where samples cannot be exchanged, or outputs have no row for each sample.
    """
    difference = norm = 0.0
    with suppress(BnprobeError, CannotEmulateError):
        pairs = list(zip(micro_batches, sizes, strict=True))
        for one, other in zip(pairs[::2], pairs[1::2], strict=False):
            half = (min(one[1], other[1]) + 1) // 2
            parts = [pick(batch, list(range(half)), size) for batch, size in (one, other)]
            mixed = _rows(session, join(parts, half), 2 * half)
            alone = [_rows(session, *each) for each in (one, other)]
            for position, rows in enumerate(alone):
                for here, there in zip(rows, mixed, strict=True):
                    again = there[position * half : (position + 1) * half]
                    difference += float(square_norm(here[:half] - again))
                    norm += float(square_norm(here[:half]))
    return math.sqrt(difference / norm) if norm and math.isfinite(difference / norm) else None


def _rows(session: Session, batch: Any, size: int) -> list[Tensor]:
    output, _ = session.forward("eval", to_device(batch, session.device), Pass(size, size))
    return [tensor for tensor in floating(output) if tensor.dim() and tensor.shape[0] == size]


def fitting_eps(
    session: Session, micro_batches: Sequence[MicroBatch], batching: Batching, stale: Sequence[str]
) -> tuple[OtherEps | None, int]:
    """The eps, in all layers, that the statistics of stale layers fit best, and the samples it was tried on.

    A layer multiplies by 1 / sqrt(variance + eps), so weights that were trained with another eps give the next layers
    inputs that are off by sqrt((v + e) / (v + eps)) in each channel, and no statistics explain it. Where that shows in
    some layer, the eps is known, and it counts in every layer: a small eps makes much of what a large one hides.
    Otherwise nothing is said of layers whose input does not depend on eps, as of the first or the only one.

    Every eps takes a pass. So all are tried on a few samples, and again on more only where that gives a hint: most
    statistics are stale for other reasons.

    Args:
        session: Installed.
        micro_batches: On the host; the first ones are enough.
        batching: How they run.
        stale: Names of the layers that look stale.

    Returns:
        None for the eps where none can be tried.
    """
    layers = [layer for layer in session.layers.layers if layer.info.running_mean is not None]
    known = [layer for layer in layers if layer.name in stale]
    enough = micro_batches[: max(1, SAMPLES_OF_EPS // batching.batch_size)]
    if not known or not enough:
        return None, 0
    # From all over them, since neighbours may be of one kind.
    few = enough[:: max(1, len(enough) // max(_FEWEST_HINTING, SAMPLES_OF_HINT // batching.batch_size))]
    trials = _trials(session, few, batching, layers, known)
    used = few
    if len(few) < len(enough) and trials.hint:
        trials, used = _trials(session, enough, batching, layers, known), enough
    return trials.best(), sum(batch.samples for batch in used)


@dataclass(frozen=True)
class _Trials:
    """What each eps leaves of the mismatch of each layer, as a part of it.

    Attributes:
        own: With that eps in the layer, too.
        as_loaded: The layer itself has the eps that it was loaded with: other than 1 only where its input changes.
    """

    own: Mapping[float, Mapping[str, float]]
    as_loaded: Mapping[float, Mapping[str, float]]

    @property
    def hint(self) -> bool:
        """Whether an eps may explain some mismatch."""
        return any(part <= _HINT for parts in self.as_loaded.values() for part in parts.values())

    def best(self) -> OtherEps | None:
        """The eps that leaves least, of the layers whose input depends on it; None where there is no such layer."""
        inputs = self.as_loaded
        always = set.intersection(*map(set, inputs.values())) if inputs else set()  # eps may decide which layers run
        telling = {name for name in always if any(abs(parts[name] - 1) > _SAME_INPUT for parts in inputs.values())}
        if not telling:
            return None
        best = min(inputs, key=lambda eps: sum(inputs[eps][name] for name in telling))
        if min(inputs[best].values()) <= EXPLAINED:
            return OtherEps(best, self.own[best])
        return OtherEps(best, {name: inputs[best][name] for name in telling})


def _trials(
    session: Session,
    micro_batches: Sequence[MicroBatch],
    batching: Batching,
    layers: Sequence[ProbedLayer],
    known: Sequence[ProbedLayer],
) -> _Trials:
    found: dict[float, _Distances] = {}
    own = _Distances({}, {}, math.inf)
    with suppress(BnprobeError, CannotEmulateError):
        own = _distances(session, micro_batches, batching, known)
        for eps in EPS:
            if all(_is_alike(_eps_of(layer), eps, own.least_variance) for layer in layers):
                found[eps] = own
                continue
            with _eps(session, layers, eps):
                found[eps] = _distances(session, micro_batches, batching, known)
    return _Trials(
        {eps: _parts(each.own, own.own) for eps, each in found.items()},
        {eps: _parts(each.as_loaded, own.as_loaded) for eps, each in found.items()},
    )


def _is_alike(eps: float, other: float, variance: float) -> bool:
    """Whether a layer scales channels of this variance, or a larger one, alike with both."""
    return eps == other or abs(math.sqrt((variance + eps) / (variance + other)) - 1) < _SAME_SCALE


@dataclass(frozen=True)
class _Distances:
    """Mismatch D of running statistics against those that training converges to, by layer.

    Attributes:
        own: With the eps that the layers have at the time.
        as_loaded: With the eps that they were loaded with: it changes only where their input does.
        least_variance: The smallest variance that any layer normalized a channel with, on average.
    """

    own: Mapping[str, float]
    as_loaded: Mapping[str, float]
    least_variance: float


def _parts(found: Mapping[str, float], whole: Mapping[str, float]) -> dict[str, float]:
    return {name: found[name] / whole[name] for name in found if whole.get(name)}


def _distances(
    session: Session, micro_batches: Sequence[MicroBatch], batching: Batching, layers: Sequence[ProbedLayer]
) -> _Distances:
    """With batch statistics, so that what is stale in earlier layers does not matter."""
    sums: dict[int, list[tuple[Tensor, Tensor]]] = {}
    least: list[Tensor] = []

    def add(batches: list[Any], size: int, outputs: Outputs, pass_: Pass) -> None:
        for (index, _), record in pass_.records.items():
            least.append(record.variance.mean(0).min())
            unbiased = record.variance * bessel(record.values)
            sums.setdefault(index, []).append((record.mean, unbiased))

    run_together(session, "steady", micro_batches, batching, add)
    own: dict[str, float] = {}
    as_loaded: dict[str, float] = {}
    for layer in layers:
        running, spread = layer.info.running_mean, layer.info.running_variance
        if layer.index not in sums or running is None or spread is None:
            continue
        mean, variance = (torch.cat(values).mean(0) for values in zip(*sums[layer.index], strict=True))
        for found, eps in ((own, _eps_of(layer)), (as_loaded, layer.info.eps)):
            scale = (spread.double() + eps).sqrt()
            shift, ratio = (mean - running.double()) / scale, (variance + eps).sqrt() / scale
            found[layer.name] = float((shift.square() + (ratio - 1).square()).mean())
    return _Distances(own, as_loaded, float(torch.stack(least).min()) if least else 0.0)


def _eps_of(layer: ProbedLayer) -> float:
    return float(getattr(layer.module, "eps", layer.info.eps))


@contextmanager
def _eps(session: Session, layers: Sequence[ProbedLayer], eps: float) -> Iterator[None]:
    """Every layer has another eps while the block runs."""
    before = [(layer.module, layer.module.eps) for layer in layers if hasattr(layer.module, "eps")]
    try:
        session.set_attribute("eps", [(module, eps) for module, _ in before])
        yield
    finally:
        session.set_attribute("eps", before)


def padding_in(micro_batches: Sequence[Any], held_out: Sequence[Any] = ()) -> Padding | None:
    """The part of the inputs that is padding, where micro-batches are padded to different sizes.

    Padding is the end of a sample, along an axis whose size differs between micro-batches, that holds one value.
    """
    axis = _ragged_axis(micro_batches)
    if axis is None:
        return None
    found = _padded(micro_batches, axis)
    return None if found is None else Padding(found, _padded(held_out, axis))


def _ragged_axis(micro_batches: Sequence[Any]) -> int | None:
    """The axis of the first tensor whose size differs between micro-batches, other than that of samples."""
    shapes = [tensor.shape for batch in micro_batches if (tensor := _inputs(batch)) is not None]
    if len(shapes) < 2 or len({len(shape) for shape in shapes}) > 1:
        return None
    axes = [axis for axis in range(1, len(shapes[0])) if len({shape[axis] for shape in shapes}) > 1]
    return axes[-1] if axes else None


def _inputs(batch: Any) -> Tensor | None:
    return next((tensor for tensor in tensors_of(batch) if tensor.is_floating_point() and tensor.dim() > 2), None)


def _padded(micro_batches: Sequence[Any], axis: int) -> float | None:
    parts = []
    for batch in micro_batches:
        values = _inputs(batch)
        if values is None or values.dim() <= axis:
            continue
        slices = values.movedim(axis, 1).flatten(2)  # samples, positions, rest
        last = slices[:, -1:, :1]
        same = (slices == last).all(2).flip(1).cumprod(1).sum(1)
        # A last position that is not constant itself is data, and so is one alone.
        parts.append((torch.where(same > 1, same, 0).double() / slices.shape[1]).mean())
    return float(torch.stack(parts).mean()) if parts else None


def random_layers_before(session: Session, batch: Any, size: int) -> Mapping[str, tuple[str, ...]] | None:
    """For each norm layer, the random layers whose output reaches it, as one forward pass in training shows.

    Returns:
        None where the pass cannot be followed.
    """
    names = {named.module: named.name for named in named_once(session.model)}
    random = [module for module in names if probability_of_dropping(module) > 0]
    if not random:
        return {layer.name: () for layer in session.layers.layers}
    sources: dict[int, str] = {}
    kept: list[Tensor] = []
    reached: dict[str, set[str]] = {}

    def mark(module: nn.Module, args: Any, output: Any) -> Any:
        if not (module.training and isinstance(output, Tensor) and output.is_floating_point()):
            return output
        before = _sources_of(output, sources)
        leaf = output.detach().clone().requires_grad_()
        sources[id(leaf)] = names[module]
        kept.append(leaf)
        behind[names[module]] = before
        return leaf

    behind: dict[str, set[str]] = {}

    def note(module: nn.Module, args: Any) -> None:
        for tensor in tensors_of(args):
            reached.setdefault(names[module], set()).update(_sources_of(tensor, sources))

    with ExitStack() as stack, torch.enable_grad():
        for module in random:
            stack.callback(module.register_forward_hook(mark).remove)
        for layer in session.layers.layers:
            stack.callback(layer.module.register_forward_pre_hook(note).remove)
        try:
            session.forward("train", to_device(batch, session.device), Pass(size, size))
        except (BnprobeError, CannotEmulateError):
            return None
    positions = {name: position for position, name in enumerate(names.values())}
    return {
        layer.name: tuple(sorted(_closure(reached.get(layer.name, set()), behind), key=lambda name: positions[name]))
        for layer in session.layers.layers
    }


def _closure(first: set[str], behind: Mapping[str, set[str]]) -> set[str]:
    found, left = set(first), list(first)
    while left:
        new = behind.get(left.pop(), set()) - found
        found |= new
        left += new
    return found


def _sources_of(tensor: Tensor, sources: Mapping[int, str]) -> set[str]:
    """The marked tensors that a tensor was computed from."""
    if id(tensor) in sources:
        return {sources[id(tensor)]}
    found: set[str] = set()
    seen: set[Any] = set()
    left = [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in sources:
            found.add(sources[id(leaf)])
        left += [before for before, _ in node.next_functions]
    return found


GENERATORS = ("random", "numpy", "torch")
"""In the order of ``random_state``."""


def randomness_of(session: Session, batch: Any, size: int) -> Randomness | None:
    """What draws random numbers in a pass in eval mode, by the global random states that move; None where it fails."""
    inside: list[str] = []
    places: dict[str, None] = {}
    functions: dict[str, None] = {}
    moved: set[str] = set()
    before = random_state()

    def look() -> None:
        """Since the last look the module that runs now has drawn what was drawn."""
        nonlocal before
        now = random_state()
        drawn = {name for name, one, other in zip(GENERATORS, before, now, strict=True) if one != other}
        if drawn and inside:
            places[inside[-1]] = None
        moved.update(drawn)
        before = now

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            state = random_state()[-1]
            result = function(*args, **(kwargs or {}))
            if random_state()[-1] != state:
                functions[str(resolve_name(function) or getattr(function, "__name__", function))] = None
            return result

    def enter(name: str) -> None:
        look()
        inside.append(name)

    def leave() -> None:
        look()
        inside.pop()

    with ExitStack() as stack, suppress(BnprobeError, CannotEmulateError):
        for named in named_once(session.model):
            place = named.kind if named.name == ROOT else f"{named.name} ({named.kind})"
            stack.callback(named.module.register_forward_pre_hook(lambda *_, place=place: enter(place)).remove)
            stack.callback(named.module.register_forward_hook(lambda *_: leave()).remove)
        with Watch():
            session.forward("eval", to_device(batch, session.device), Pass(size, size))
        look()
        generators = tuple(name for name in reversed(GENERATORS) if name in moved)
        return Randomness(generators, tuple(places), tuple(functions))
    return None

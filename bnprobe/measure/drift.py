"""Samples at the input of norm layers, as a profile describes healthy ones, and the test that compares others with it.

Of a sample two figures per channel count, see ``bnprobe.records.ProfiledLayer``: its position and its extent. Samples
are taken in blocks: the mean of a block shows a consistent shift that no single sample does.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnprobe.errors import UsageError
from bnprobe.measure.batch import as_plain
from bnprobe.measure.forward_pass import Slot, as_channels
from bnprobe.measure.layers import ProbedLayer
from bnprobe.measure.norms import FunctionFamily, NormInfo, WholeModule
from bnprobe.records import ChannelDrift, LayerDrift, Profile, ProfiledLayer, SkippedLayer
from bnprobe.stats.moments import row_sums, wide
from bnprobe.stats.sequential import Exchangeable, rejected

LEAST_BLOCKS = 16
"""A profile needs so many scores; with fewer no shift could be told from chance for long."""

MOST_BLOCKS = 512
"""It holds at most so many."""

_MOST_SQUARE = 64.0
"""Of z, in a score: a channel that healthy samples hardly ever move would else outweigh all others."""

_LEAST_SPREAD = 1e-3
"""A channel that does not vary counts as one with this standard deviation."""

_LATELY = 32
"""Blocks that are kept to say how far channels moved."""

_CHANNELS = 5
"""Channels that are named for each layer."""


def watchable(layers: Sequence[ProbedLayer]) -> tuple[list[ProbedLayer], list[SkippedLayer]]:
    """The layers whose input can be compared with their running statistics, and why the others' cannot."""
    kept, skipped = [], []
    for layer in layers:
        info, reason = layer.info, layer.unusable
        if info.running_mean is None or info.running_variance is None:
            reason = "it keeps no running statistics"
        elif isinstance(layer.family, FunctionFamily | WholeModule):
            reason = "it is no layer of torch.nn or bnprobe.nn, of which the input is known"
        elif info.running_mean.shape != (info.channels,):
            reason = "it keeps several sets of running statistics"
        if reason is None:
            kept.append(layer)
        else:
            skipped.append(SkippedLayer(layer.name, type(layer.module).__name__, reason))
    return kept, skipped


def digest_of(layers: Sequence[ProbedLayer]) -> str:
    """Of their names and running statistics, by which a model is known again on any device."""
    found = hashlib.sha256()
    for layer in layers:
        found.update(layer.name.encode())
        for value in (layer.info.running_mean, layer.info.running_variance):
            assert value is not None  # watchable() said so
            found.update(value.detach().double().cpu().numpy().tobytes())
    return found.hexdigest()


def slots_of(profile: Profile, layers: Sequence[ProbedLayer]) -> list[Slot]:
    """The calls of a profile in a model.

    Raises:
        UsageError: The profile is of another model, or of other weights.
    """
    known = {layer.name: layer for layer in layers}
    missing = [layer.name for layer in profile.layers if layer.name not in known]
    if missing:
        raise UsageError(
            f"The profile is of {profile.model}, with the layer {missing[0]}, which this model does not have. Make a"
            " profile of this one: bnprobe profile."
        )
    named = list(dict.fromkeys(layer.name for layer in profile.layers))
    if digest_of([known[name] for name in named]) != profile.statistics:
        raise UsageError(
            f"The running statistics are not those of {profile.model} when its profile was made. Make the profile anew"
            " of these weights, in the precision in which the model serves: bnprobe profile."
        )
    return [(known[layer.name].index, layer.call) for layer in profile.layers]


class LayerInputs:
    """Takes samples at the input of layers while a forward pass runs, which it leaves as it is.

    Nothing is read from the device. Calls on another thread than that which opened ``taking`` are left alone.

    Args:
        layers: As ``watchable`` gives them.
        exact: Compute in float64.

    Attributes:
        seconds: That this took in the layers of the last pass.
    """

    def __init__(self, layers: Sequence[ProbedLayer], exact: bool = False) -> None:
        self._exact = exact
        self._of_modules = {layer.module: layer for layer in layers}
        self._thread: int | None = None
        self._samples = 0
        self._most: int | None = None
        self._moments: dict[Slot, tuple[Tensor, Tensor]] = {}
        self._calls: Counter[int] = Counter()
        self._failed: dict[Slot, str] = {}
        self._centres: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._scales: dict[tuple[Slot, ...], Tensor] = {}
        self.seconds = 0.0

    @contextmanager
    def taking(self, samples: int, most: int | None = None) -> Iterator[None]:
        """Hook the layers while the block runs.

        Args:
            samples: In the batch.
            most: Take the first so many; None: all.
        """
        self._moments, self._failed = {}, {}
        self._calls.clear()
        self._thread, self._samples, self._most = get_ident(), samples, most
        self.seconds = 0.0
        with ExitStack() as hooks:
            for module in self._of_modules:
                handle = module.register_forward_pre_hook(self.enter, with_kwargs=True)
                hooks.callback(handle.remove)
            yield

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take samples where the module is one of the layers; for a call that had begun before it was hooked."""
        layer = self._of_modules.get(module)
        if layer is not None and get_ident() == self._thread:
            began = perf_counter()
            self._take(layer, args[0] if args else kwargs.get("input"))
            self.seconds += perf_counter() - began

    def _take(self, layer: ProbedLayer, x: Any) -> None:
        slot = layer.index, self._calls[layer.index]
        self._calls[layer.index] += 1
        if layer.module.training:
            self._failed[slot] = "it normalizes with the statistics of the batch"
        elif not isinstance(x, Tensor) or x.dim() < 2 or x.shape[0] != self._samples:
            self._failed[slot] = "it does not see one row for each sample"
        elif not x.is_floating_point():
            self._failed[slot] = f"its input is of {x.dtype}"
        else:
            with torch.no_grad():
                self._moments[slot] = self._around_running_mean(layer, as_plain(x.detach())[: self._most])

    def _around_running_mean(self, layer: ProbedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and mean square of each sample and channel around the running mean, where no digits are lost."""
        dtype = torch.float64 if self._exact else wide(x.dtype)
        key = layer.index, x.device, dtype
        if key not in self._centres:
            assert layer.info.running_mean is not None  # watchable() said so
            self._centres[key] = layer.info.running_mean.detach().to(x.device, dtype)
        sums = row_sums(x - as_channels(self._centres[key], x))
        if sums.positions is None:
            return sums.mean, sums.squares + sums.mean.square()
        return sums.mean, sums.squares / sums.positions

    @property
    def failed(self) -> Mapping[Slot, str]:
        """Calls in the last pass of which nothing could be taken, and why."""
        return self._failed

    @property
    def taken(self) -> list[Slot]:
        """Calls in the last pass of which samples were taken, in network order."""
        return sorted(self._moments)

    def sizes(self, slots: Sequence[Slot]) -> list[int]:
        """Channels of each of these calls in the last pass."""
        return [self._moments[slot][0].shape[1] for slot in slots]

    def features(self, slots: Sequence[Slot]) -> Tensor | None:
        """Position and extent of each sample in every channel of these calls, one call after the other.

        Returns:
            Float64, shape (samples, 2, channels of all calls), on the device; None where a call was not taken.
        """
        if not slots or any(slot not in self._moments for slot in slots):
            return None
        device = self._moments[slots[0]][0].device
        with torch.no_grad():
            mean, square = (
                torch.cat([self._moments[slot][part].to(device) for slot in slots], dim=1).double() for part in (0, 1)
            )
            scale = self._scale(tuple(slots), device)
            return torch.stack([mean * scale, torch.log1p(square * scale.square())], dim=1)

    def _scale(self, slots: tuple[Slot, ...], device: torch.device) -> Tensor:
        """One over the running standard deviation, of all channels."""
        if slots not in self._scales:
            infos = {layer.index: layer.info for layer in self._of_modules.values()}
            variances = [_with_eps(infos[index]).to(device) for index, _ in slots]
            self._scales = {slots: torch.cat(variances).rsqrt()}
        return self._scales[slots].to(device)


def _with_eps(info: NormInfo) -> Tensor:
    assert info.running_variance is not None  # watchable() said so
    return info.running_variance.detach().double().cpu() + info.eps_of_channels


class Healthy:
    """Mean and standard deviation of features over samples, and the scores of blocks against them.

    Args:
        centre, spread: Float64, shape (2, channels of all layers).
        sizes: Channels of each layer.
    """

    def __init__(self, centre: Tensor, spread: Tensor, sizes: Sequence[int]) -> None:
        self.centre, self.spread, self.sizes = centre, spread.clamp(min=_LEAST_SPREAD), list(sizes)

    @classmethod
    def of(cls, profile: Profile) -> Healthy:
        """What a profile holds."""

        def joined(*names: str) -> Tensor:
            rows = [[value for layer in profile.layers for value in getattr(layer, name)] for name in names]
            return torch.tensor(rows, dtype=torch.float64)

        sizes = [layer.channels for layer in profile.layers]
        return cls(joined("position", "extent"), joined("position_spread", "extent_spread"), sizes)

    def to(self, device: torch.device) -> Healthy:
        """The same on a device."""
        return Healthy(self.centre.to(device), self.spread.to(device), self.sizes)

    def deviations(self, features: Tensor, block: int) -> Tensor:
        """How far the mean of every ``block`` samples is off, in standard deviations of samples."""
        means: Tensor = features.unflatten(0, (-1, block)).mean(1)
        return (means - self.centre) / self.spread

    def scores(self, deviations: Tensor, block: int) -> Tensor:
        """The mean of z squared over position and extent of the channels of each layer, shape (blocks, layers)."""
        squares = (deviations.square() * block).clamp(max=_MOST_SQUARE).mean(1)
        return torch.stack([part.mean(1) for part in squares.split(self.sizes, dim=1)], dim=1)


class Drift:
    """Compares a stream of samples with a profile.

    Args:
        profile: What healthy samples look like.
        alpha: The probability of an alarm in a stream of any length that is exchangeable with the profile's samples.
        seed: Of the test's own random numbers.

    Attributes:
        samples: Seen so far.
        alarm: Samples seen when the alarm was raised; None before.
    """

    def __init__(self, profile: Profile, alpha: float, seed: int = 0) -> None:
        if not 0 < alpha < 1:
            raise UsageError(f"alpha={alpha} is a probability: give a number between 0 and 1.")
        self._profile, self._alpha = profile, alpha
        self._healthy = Healthy.of(profile)
        scores = np.array([layer.scores for layer in profile.layers], dtype=np.float64)
        self._test = Exchangeable(scores.T, seed)
        self._rest: Tensor | None = None
        self._lately: deque[Tensor] = deque(maxlen=_LATELY)
        self._moved: set[int] = set()
        self._blocks = 0
        self.samples = 0
        self.alarm: int | None = None

    def add(self, features: Tensor) -> float:
        """Take in samples, as ``LayerInputs.features`` gives them; reads from the device once, if a block is full.

        Returns:
            Seconds for which it waited for the device.
        """
        self.samples += features.shape[0]
        rows = features if self._rest is None else torch.cat([self._rest, features])
        block = self._profile.block
        whole = rows.shape[0] // block * block
        self._rest = rows[whole:].clone() if whole < rows.shape[0] else None
        if not whole:
            return 0.0
        if self._healthy.centre.device != rows.device:
            self._healthy = self._healthy.to(rows.device)
        deviations = self._healthy.deviations(rows[:whole], block)
        self._lately.extend(deviations.float().unbind())
        scores = self._healthy.scores(deviations, block)
        began = perf_counter()
        read = scores.cpu().numpy()
        waited = perf_counter() - began
        for row in read:
            self._judge(row)
        return waited

    def _judge(self, scores: Any) -> None:
        self._test.update(scores)
        self._blocks += 1
        if self.alarm is None and self.e_value >= 1 / self._alpha:
            self.alarm = self._blocks * self._profile.block
        if self.alarm is not None:
            self._moved |= set(rejected(self._test.e_values(), self._alpha))

    @property
    def e_value(self) -> float:
        """Evidence against the stream, the mean over layers."""
        return float(self._test.e_values().mean())

    def layers(self) -> tuple[LayerDrift, ...]:
        """Every layer of the profile, in network order."""
        values = self._test.e_values()
        moved = self._moved or ({int(values.argmax())} if self.alarm is not None else set())
        sizes = self._healthy.sizes
        kept = torch.stack(list(self._lately)).double().cpu() if self._lately else torch.zeros(0, 2, sum(sizes))
        return tuple(
            self._layer(index, layer, part, float(values[index]), index in moved)
            for index, (layer, part) in enumerate(zip(self._profile.layers, kept.split(sizes, dim=2), strict=True))
        )

    def _layer(self, index: int, layer: ProfiledLayer, kept: Tensor, e_value: float, moved: bool) -> LayerDrift:
        blocks = int(self._test.since[index])
        since = blocks * self._profile.block if blocks else None
        part = kept[-min(blocks or _LATELY, _LATELY) :]
        off = part.mean(0) if len(part) else torch.zeros(2, layer.channels, dtype=torch.float64)
        count = len(part) * self._profile.block
        chance = 1 / count + 1 / self._profile.described if count else 0.0
        rms = [math.sqrt(max(0.0, float(row.square().mean()) - chance)) for row in off]
        farthest = off.abs().amax(0).argsort(descending=True, stable=True)[:_CHANNELS].tolist()
        channels = tuple(ChannelDrift(each, float(off[0, each]), float(off[1, each])) for each in farthest)
        return LayerDrift(layer.name, layer.call, self.samples, e_value, moved, since, rms[0], rms[1], channels)

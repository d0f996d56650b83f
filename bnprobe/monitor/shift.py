"""``bnprobe.ShiftMonitor``: whether what a model sees in service is like what its profile holds."""

from __future__ import annotations

import statistics
import sys
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from math import ceil
from os import PathLike
from threading import Lock, get_ident
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bnprobe.commands.drift import ALPHA, report_of
from bnprobe.errors import UsageError, warn_user
from bnprobe.loading.model import unwrapped
from bnprobe.loading.samples import count_samples_of_call
from bnprobe.measure.drift import Drift, LayerInputs, slots_of, watchable
from bnprobe.measure.layers import find_layers
from bnprobe.numbers import count, listed
from bnprobe.records import DriftReport, LayerDrift, Profile

if TYPE_CHECKING:
    from types import TracebackType

    from torch.utils.hooks import RemovableHandle
    from typing_extensions import Self

OnAlarm = Callable[["ShiftMonitor"], object]
"""Called with the monitor, once, when it raises its alarm."""

_CLOSEST = 8
"""Batches from look to look, where the monitor spaces them and they cost little."""

_SHARE = 0.02
"""Of the time of forward passes, that looks take as they reckon it. Not in it: that torch calls hooks, some 10
microseconds for each batch, and that a look leaves caches colder."""


_COMPILED = (
    "A compiled model calls its layers in code of its own, which a monitor does not see. Let the model serve without"
    " torch.compile."
)


class ShiftMonitor:
    """Watches a model in service: are its samples, layer by layer, like those of its profile?

    Of every 8th batch in eval mode, or of fewer, it takes the first ``samples`` samples at the input of each layer of
    the profile, and compares the mean of each block of them with the scores of the profile by a conformal test:
    p-values against the profile's blocks and the blocks before, and bets against their being uniform, beginning anew
    before every block. The alarm is raised when the mean over layers of these e-processes reaches 1 / ``alpha``; e-BH
    says which layers moved.

    What is assumed: the blocks of the profile and of a healthy stream are exchangeable, that is, samples come
    independently from one distribution. Then the probability that a stream of any length has an alarm is at most
    ``alpha``, whatever the size of the profile: over profiles and streams together; with one profile for many streams
    all of them have its luck. A small profile costs time to detection, not false alarms: the first p-values cannot be
    below 1 / (blocks + 1), and a small shift is found, if at all, before it came to as many blocks as were seen before
    it. A stream in an order (sorted by class, neighbouring frames of a video) is not exchangeable with samples drawn at
    random, and raises an alarm: profile samples as they come in service.

    Looks are so far apart that they take some 2% of the time of forward passes, going by the last nine looks and the
    passes in which they were taken. So whether a batch is looked at depends on the time that earlier ones took, and not
    on what is in it: samples that come independently from one distribution still do so, and the probability of a false
    alarm holds as it stands. With ``every``, the same batches are looked at in every run.

    The model's outputs and the random state are bit-identical to those without a monitor. Memory is bounded: up to
    2,048 scores of every layer and the means of the last 32 blocks in every channel. Between the batches that it looks
    at, one hook on the model counts; of a batch that it looks at, it reads from the device at most once, where a block
    is full.

    Args:
        model: In eval mode, as it serves; also wrapped by DistributedDataParallel.
        profile: From `bnprobe.profile`, or the file that ``bnprobe profile`` wrote; of the same weights, in the same
            precision.
        every: Look at every so-manieth batch, whatever that costs; None: as above.
        samples: Take at most so many of a batch; None: as many as a block has.
        alpha: The probability of a false alarm in a stream, however long.
        on_alarm: "warn", or a function that takes the monitor.
        seed: Of the test's own random numbers.

    Attributes:
        batches: In eval mode so far, looked at or not.
        samples: Samples seen so far.
        left_out: Batches looked at that could not be judged.

    Raises:
        UsageError: An argument cannot work, the model is compiled, or the profile is not of these weights.

    Example:
        >>> profile = bnprobe.profile(model.eval(), loader, block=2)
        >>> with bnprobe.ShiftMonitor(model, profile, every=1, on_alarm=print) as monitor:
        ...     outputs = [model(images) for images, _ in loader]
        >>> monitor.alarm, monitor.samples
        (False, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        profile: Profile | str | PathLike[str],
        *,
        every: int | None = None,
        samples: int | None = None,
        alpha: float = ALPHA,
        on_alarm: str | OnAlarm = "warn",
        seed: int = 0,
    ) -> None:
        self._profile = profile if isinstance(profile, Profile) else Profile.load(profile)
        most = self._profile.block if samples is None else samples
        if (every is not None and every < 1) or most < 1:
            raise UsageError(f"every={every} and samples={samples}: give at least 1 of each.")
        if on_alarm != "warn" and not callable(on_alarm):
            raise UsageError(f'on_alarm={on_alarm!r} is neither "warn" nor a function of the monitor.')
        self._model, _ = unwrapped(model)
        _require_watchable(model)
        self._every, self._most, self._alpha, self._seed = every, most, alpha, seed
        self._on_alarm: OnAlarm = on_alarm if callable(on_alarm) else _warn
        layers, _ = watchable(find_layers(self._model, lambda *names: True).layers)
        self._slots = slots_of(self._profile, layers)
        indices = {index for index, _ in self._slots}
        self._inputs = LayerInputs([layer for layer in layers if layer.index in indices])
        self._hooks: list[RemovableHandle] = []
        self._taking, self._lock = ExitStack(), Lock()
        self._thread: int | None = None
        self._depth = 0
        self._handled: BaseException | None = None
        self._is_compiled = self._is_told = False
        self.batches = self.left_out = 0
        self._looked = self._next = 0
        self._costs: deque[float] = deque(maxlen=9)
        self._began = self._prepared = 0.0
        self._drift = Drift(self._profile, alpha, seed)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to watch: as the beginning of a ``with`` block."""
        if not self._hooks:
            before = self._model.register_forward_pre_hook(self._before, with_kwargs=True)
            after = self._model.register_forward_hook(self._after, always_call=True)
            self._hooks = [before, after]

    def stop(self) -> None:
        """End: nothing of the monitor is left on the model. `start` goes on with the same stream."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()
        self._leave()

    def reset(self) -> None:
        """Begin a new stream, as after an alarm that was dealt with; it has a rate of false alarms of its own."""
        self._seed += 1
        self._drift = Drift(self._profile, self._alpha, self._seed)
        self.batches = self.left_out = self._looked = self._next = 0

    @property
    def samples(self) -> int:
        return self._drift.samples

    @property
    def alarm(self) -> bool:
        """Whether the alarm was raised; it stays until `reset`."""
        return self._drift.alarm is not None

    @property
    def e_value(self) -> float:
        """Evidence that the stream is not like the profile."""
        return self._drift.e_value

    @property
    def layers(self) -> tuple[LayerDrift, ...]:
        """Every layer of the profile: what speaks against it, how far it moved, and which channels most."""
        return self._drift.layers()

    def summary(self) -> DriftReport:
        """What was seen so far; ``print`` shows it."""
        found = report_of(
            self._drift, self._profile, type(self._model).__name__, self._alpha, self._looked, self.left_out, None
        )
        return replace(found, notes=(*found.notes, _COMPILED)) if self._is_compiled else found

    # --- A batch ------------------------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self._is_compiled = True
            return
        if module.training:
            if not self.batches and not self._is_told:
                self._is_told = True
                warn_user("bnprobe.ShiftMonitor watches a model in eval mode, and this one is in train mode.")
            return
        if self._thread == get_ident():
            self._depth += 1  # the model calls itself
            return
        self.batches += 1
        if self.batches <= self._next or not self._lock.acquire(blocking=False):
            return  # or another thread's batch is being looked at
        self._thread, self._depth, self._handled = get_ident(), 1, sys.exc_info()[1]
        self._next = self.batches - 1 + self._distance()
        self._began = perf_counter()
        try:
            self._taking.enter_context(self._inputs.taking(count_samples_of_call(args, kwargs) or 0, self._most))
            self._prepared = perf_counter()
            self._inputs.enter(module, args, kwargs)  # a layer that is the whole model
        except Exception as error:
            self._give_up(error)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or self._thread != get_ident():
            return
        self._depth -= 1
        if self._depth:
            return
        returned, had_alarm = perf_counter(), self.alarm
        # Of a pass that raised nothing is judged: what follows may end in `stop`, while torch iterates over the hooks.
        raised = sys.exc_info()[1] is not self._handled
        try:
            self._taking.close()
            self._looked += 1
            features = None if raised else self._inputs.features(self._slots)
            self.left_out += features is None
            # The wait for the device is the forward pass's.
            waited = 0.0 if features is None else self._drift.add(features)
            self._note_cost(returned + waited)
        except Exception as error:  # whatever it is, the model goes on serving
            self._give_up(error)
            return
        finally:
            self._leave()
        if self.alarm and not had_alarm:
            self._on_alarm(self)

    def _distance(self) -> int:
        """Batches from this look to the next."""
        if self._every is not None:
            return self._every
        return max(_CLOSEST, ceil(statistics.median(self._costs) / _SHARE)) if self._costs else _CLOSEST

    def _note_cost(self, returned: float) -> None:
        """Of this look, in forward passes of its batch. The first one, which also sets things up, does not count."""
        ended = perf_counter()
        own = self._prepared - self._began + self._inputs.seconds + ended - returned
        if self._looked > 1:
            self._costs.append(own / max(ended - self._began - own, 1e-9))

    def _leave(self) -> None:
        """End the look at a batch, if there is one."""
        self._taking.close()
        self._thread = self._handled = None
        if self._lock.locked():
            self._lock.release()

    def _give_up(self, error: Exception) -> None:
        self.stop()
        warn_user(f"bnprobe.ShiftMonitor stopped, and the model goes on: {type(error).__name__}: {error}")


def _require_watchable(model: nn.Module) -> None:
    """Refuse a model whose layers are not called where hooks see it.

    Raises:
        UsageError: Says why.
    """
    if isinstance(model, nn.DataParallel):
        raise UsageError("DataParallel runs copies of the model, which a monitor does not see.")
    for module in model.modules():
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            raise UsageError(_COMPILED)


def _warn(monitor: ShiftMonitor) -> None:
    moved = [layer.name for layer in monitor.layers if layer.moved]
    warn_user(
        f"bnprobe: after {count(monitor.samples, 'sample')}, what the model sees is not like its profile, in"
        f" {listed(moved, 3)}. monitor.summary() says how far."
    )

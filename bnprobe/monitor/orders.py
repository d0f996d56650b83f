"""What a monitor does to layers: at once, or where several processes train, in all of them after the same step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bnprobe.distributed import ALONE, World
from bnprobe.errors import UsageError
from bnprobe.monitor.changes import RAMP, Change, change, restored, take_back, take_statistics
from bnprobe.monitor.sampling import Inputs, Sampler
from bnprobe.monitor.screening import Screening
from bnprobe.records import RECALIBRATE, UNDO


@dataclass(frozen=True)
class Order:
    """What is to be done to layers.

    Attributes:
        action: One of ``ACTIONS``, or ``UNDO``.
        kept, size: The batches of a recalibration, where it is made, and their samples.
    """

    action: str
    layers: list[str]
    kept: list[Inputs] = field(default_factory=list)
    size: int = 0


class Orders:
    """The layers that a monitor has changed, and those that it is about to change.

    Args:
        sampler: Follows the layers that take the place of others.
        screening: Begins again to ask whether a cause is gone.
        every: Steps from sample to sample.
        done: Is told what was done.
        warn: Is told what could not be done.

    Attributes:
        changes: The layers that are changed at the moment.
        world: The processes that change layers together; one of them alone does so at once.
    """

    def __init__(
        self,
        sampler: Sampler,
        screening: Screening,
        every: int,
        done: Callable[[str, list[str]], None],
        warn: Callable[[str], None],
    ) -> None:
        self.changes: list[Change] = []
        self.world: World = ALONE
        self._sampler, self._screening, self._every = sampler, screening, every
        self._done, self._warn = done, warn
        self._waiting: list[Order] = []

    def act(self, action: str, layers: Sequence[str], kept: list[Inputs], size: int) -> None:
        """Change layers that are not changed yet; one that cannot be is warned of."""
        changed = {name for made in self.changes for name in made.layers}
        changed |= {name for order in self._waiting for name in order.layers}
        names = [name for name in layers if name not in changed]
        if action != RECALIBRATE:  # a layer in eval mode normalizes with its running statistics already
            names = [name for name in names if self._sampler.model.get_submodule(name).training]
        if names:
            self._give(Order(action, names, kept, size))

    def take_back_what_is_over(self) -> None:
        """Make layers BN again whose cause is gone."""
        for made in [each for each in self.changes if self._screening.is_over(each.layers)]:
            self._give(Order(UNDO, list(made.layers)))

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Change the layers that a saved run had changed, and no others."""
        for made in self.changes:
            self._take_back(made)
        for each in states:
            self._follow(restored(self._sampler.model, each))

    def _give(self, order: Order) -> None:
        self._waiting.append(order)
        if self.world.size == 1:
            self._say(self._carry_out_all())

    def _carry_out_all(self) -> list[Order]:
        """Do what waits; what could be done."""
        orders, self._waiting = self._waiting, []
        done = []
        for order in orders:
            try:
                self._carry_out(order)
            except Exception as error:  # other processes wait for what is decided
                self._warn(f"no layer was changed: {error}")
            else:
                done.append(order)
        return done

    def _carry_out(self, order: Order) -> None:
        if order.action == UNDO:
            self._take_back(next(made for made in self.changes if list(made.layers) == order.layers))
        elif order.action != RECALIBRATE:
            self._follow(change(self._sampler.model, order.action, order.layers, RAMP * self._every))
            self._screening.forget_over(order.layers)
        elif order.kept:
            take_statistics(self._sampler.model, order.layers, order.kept, order.size)

    def agree(self, gave_up: bool) -> bool:
        """Do in every process what the first one decided since the last time; whether it goes on.

        There it is done first. The others get its layers' buffers, too, so that a layer that normalizes with its
        running statistics is the same everywhere.

        Args:
            gave_up: Of the first process: it decides no more.

        Raises:
            UsageError: A process cannot do it; no layer was changed.
        """
        done = [] if gave_up else self._carry_out_all()
        buffers = {name: self._buffers(name) for order in done for name in order.layers}
        plain = [(order.action, order.layers) for order in done]
        decided = self.world.share(None if gave_up else (plain, buffers))
        if decided is None:
            return False
        plain, buffers = decided
        if not plain:
            return True
        problem = None
        try:
            for action, layers in plain if not self.world.is_main else ():
                self._carry_out(Order(action, layers))
            for name, values in buffers.items():
                for own, value in zip(self._buffers(name), values, strict=True):
                    own.copy_(value)
        except Exception as error:  # the others wait for it
            problem = f"process {self.world.rank}: {error}"
        if problems := [each for each in self.world.gather(problem) if each]:
            for made in [made for made in self.changes if (made.action, list(made.layers)) in plain]:
                self._take_back(made)
            raise UsageError(f"No layer was changed, since not every process can: {problems[0]}")
        self._say(done)
        return True

    def _buffers(self, name: str) -> list[Tensor]:
        (module,) = [layer.module for layer in self._sampler.layers.layers if layer.name == name]
        return list(module.buffers(recurse=False))

    def _say(self, done: Sequence[Order]) -> None:
        for order in done:
            self._done(order.action, order.layers)

    def _follow(self, made: Change) -> None:
        self.changes.append(made)
        self._sampler.follow(made.layers, changed=True)

    def _take_back(self, made: Change) -> None:
        take_back(self._sampler.model, made)
        self.changes = [each for each in self.changes if each is not made]
        self._sampler.follow(made.layers, changed=False)

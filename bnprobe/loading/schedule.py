"""The spec's ``train.schedule`` -> what makes a learning rate schedule of an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from bnprobe.errors import UsageError
from bnprobe.loading.catalogue import Catalogue, Maker, find_maker
from bnprobe.loading.inspection import kind_of, signature_of
from bnprobe.loading.modules import UserModule
from bnprobe.spec import ScheduleSpec

_CATALOGUE = Catalogue("train.schedule", "schedule", lr_scheduler, lr_scheduler.LRScheduler, "optimizer")

MakeOptimizer = Callable[[list[nn.Parameter]], Any]


@dataclass(frozen=True)
class ScheduleFactory:
    """Makes learning rate schedules.

    Attributes:
        maker: What makes them.
    """

    maker: Maker

    @property
    def name(self) -> str:
        """E.g. "torch.optim.lr_scheduler.CosineAnnealingLR" or "model.py:make_schedule"."""
        return self.maker.name

    def __call__(self, optimizer: Any) -> Any:
        """The schedule of this optimizer; ``step()`` it after every optimizer step.

        Raises:
            UsageError: The schedule refuses its arguments or the optimizer, or has no ``step()`` without arguments.
            UserCodeError: The user's own function raised.
        """
        schedule = self.maker(optimizer)
        step = getattr(schedule, "step", None)
        if not callable(step):
            raise UsageError(
                f"train.schedule.target: {self.name} returned {kind_of(schedule)}, not a schedule with step()."
            )
        self._refuse_metric(step)
        return schedule

    def _refuse_metric(self, step: Callable[..., Any]) -> None:
        needed = [name for name, each in signature_of(step).items() if _is_needed(each)]
        if needed:
            raise UsageError(
                f"train.schedule.target: {self.name} needs {', '.join(needed)} at every step(), but a schedule here is"
                " stepped after each optimizer step, when nothing is evaluated. Use CosineAnnealingLR with T_max = the"
                " steps of the run, or keep the rate and stop early with --patience (train.patience)."
            )


def load_schedule(
    spec: ScheduleSpec, near: UserModule | None = None, make_optimizer: MakeOptimizer | None = None
) -> ScheduleFactory:
    """Find what a spec names, and see that it takes the arguments, before anything is trained.

    Args:
        spec: ``CosineAnnealingLR``, ``torch.optim.lr_scheduler.CosineAnnealingLR``, or a class or function of the
            user's: ``callable(optimizer, **args)``.
        near: The model's module, where a plain name that is not of torch's is looked up.
        make_optimizer: What will make the optimizer, for torch's classes that ask things of it; None: SGD with
            momentum.

    Raises:
        UsageError: No such schedule, or arguments that it refuses; names the key of the spec.
        ModelError: The user's file, module or symbol is not there.
        UserCodeError: The user's module raised while it was loaded.
    """
    target = spec.target.removeprefix("torch.optim.lr_scheduler.").removeprefix("lr_scheduler.")
    factory = ScheduleFactory(find_maker(_CATALOGUE, target, spec.args, near))
    if factory.maker.require_args() and factory.maker.of_torch:
        _try(factory, (make_optimizer or _throw_away)([nn.Parameter(torch.zeros(1, 1))]))
    return factory


def _try(factory: ScheduleFactory, optimizer: Any) -> None:
    """One step: some classes look at their arguments only then."""
    schedule = factory(optimizer)
    optimizer.step()
    with factory.maker.refusing():
        schedule.step()


def _throw_away(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _is_needed(parameter: inspect.Parameter) -> bool:
    named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return named and parameter.default is parameter.empty

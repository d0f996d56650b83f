"""Turn the spec's ``train.schedule`` into a factory of learning rate schedules."""

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
    """Makes learning rate schedules for given optimizers.

    Attributes:
        maker: The class or function that is called.
    """

    maker: Maker

    @property
    def name(self) -> str:
        """Full name, e.g. "torch.optim.lr_scheduler.CosineAnnealingLR" or "model.py:make_schedule"."""
        return self.maker.name

    def __call__(self, optimizer: Any) -> Any:
        """Make a schedule for this optimizer; call its ``step()`` after every optimizer step.

        Raises:
            UsageError: The schedule rejects its arguments or the optimizer, or its ``step()`` needs arguments.
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
                f"train.schedule.target: step() of {self.name} needs {', '.join(needed)}, but bnprobe calls step()"
                " without arguments after every optimizer step. Use CosineAnnealingLR with T_max = the steps of the"
                " run, or a constant learning rate with early stopping by --patience (train.patience)."
            )


def load_schedule(
    spec: ScheduleSpec, near: UserModule | None = None, make_optimizer: MakeOptimizer | None = None
) -> ScheduleFactory:
    """Find the schedule that a spec names, and check that it accepts the arguments, before anything is trained.

    Args:
        spec: ``CosineAnnealingLR``, ``torch.optim.lr_scheduler.CosineAnnealingLR``, or a class or function of the
            user: ``callable(optimizer, **args)``.
        near: The model's module, where a plain name that torch does not have is looked up.
        make_optimizer: Makes the optimizer, for schedules of torch that depend on its kind; None: SGD with momentum.

    Raises:
        UsageError: No such schedule, or it rejects the arguments; the message names the key of the spec.
        ModelError: The user's file, module or symbol does not exist.
        UserCodeError: The user's module raised while it was loaded.
    """
    target = spec.target.removeprefix("torch.optim.lr_scheduler.").removeprefix("lr_scheduler.")
    factory = ScheduleFactory(find_maker(_CATALOGUE, target, spec.args, near))
    if factory.maker.require_args() and factory.maker.of_torch:
        _try(factory, (make_optimizer or _throw_away)([nn.Parameter(torch.zeros(1, 1))]))
    return factory


def _try(factory: ScheduleFactory, optimizer: Any) -> None:
    """Take one step: some classes check their arguments only then."""
    schedule = factory(optimizer)
    optimizer.step()
    with factory.maker.refusing():
        schedule.step()


def _throw_away(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _is_needed(parameter: inspect.Parameter) -> bool:
    named = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return named and parameter.default is parameter.empty

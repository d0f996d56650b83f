"""Turn the spec's ``train.optimizer`` into a factory of optimizers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bnprobe.errors import UsageError
from bnprobe.loading.catalogue import Catalogue, Maker, find_maker
from bnprobe.loading.inspection import kind_of, signature_of
from bnprobe.loading.modules import UserModule
from bnprobe.spec import OptimizerSpec

_CATALOGUE = Catalogue("train.optimizer", "optimizer", torch.optim, torch.optim.Optimizer, "parameters")


@dataclass(frozen=True)
class OptimizerFactory:
    """Makes optimizers for given parameters.

    Attributes:
        maker: The class or function that is called.
    """

    maker: Maker

    @property
    def name(self) -> str:
        """Full name, e.g. "torch.optim.SGD" or "model.py:make_optimizer"."""
        return self.maker.name

    def __call__(self, parameters: list[nn.Parameter]) -> Any:
        """Make an optimizer for these parameters.

        Raises:
            UsageError: The optimizer rejects its arguments, or does not work with zero_grad(), backward() and step().
            UserCodeError: The user's own function raised.
        """
        optimizer = self.maker(parameters)
        self._check(optimizer)
        return optimizer

    def _check(self, optimizer: object) -> None:
        key, step = "train.optimizer.target", getattr(optimizer, "step", None)
        if not callable(step):
            raise UsageError(f"{key}: {self.name} returned {kind_of(optimizer)}, not an optimizer with step().")
        closure = signature_of(step).get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UsageError(
                f"{key}: step() of {self.name} needs a closure that recomputes the loss, which bnprobe does not"
                " support. Choose another optimizer, e.g. SGD."
            )


def load_optimizer(spec: OptimizerSpec, near: UserModule | None = None) -> OptimizerFactory:
    """Find the optimizer that a spec names, and check that it accepts the arguments, before anything is measured.

    Args:
        spec: ``SGD``, ``torch.optim.SGD``, or a class or function of the user: ``callable(parameters, **args)``.
        near: The model's module, where a plain name that torch.optim does not have is looked up.

    Raises:
        UsageError: No such optimizer, or it rejects the arguments; the message names the key of the spec.
        ModelError: The user's file, module or symbol does not exist.
        UserCodeError: The user's module raised while it was loaded.
    """
    factory = OptimizerFactory(find_maker(_CATALOGUE, spec.target, spec.args, near))
    if factory.maker.require_args() and factory.maker.of_torch:
        factory([nn.Parameter(torch.zeros(1, 1))])
    return factory

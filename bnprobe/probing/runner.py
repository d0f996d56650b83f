"""Run one forward pass of the user's model, on one path, on one physical batch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from bnprobe.probing.batches import copy_tensors
from bnprobe.probing.forward import default_forward, describe_call, model_code
from bnprobe.probing.intercept import Interceptor, Pass
from bnprobe.probing.layers import LayerSet
from bnprobe.probing.replay import Outputs, recording, replaying
from bnprobe.usercode import BatchFunction

PathName = Literal["train", "steady", "eval", "check", "check train", "check eval"]
"""The two paths; "steady", which is the train path without dropout and the like: batch statistics, all else in eval
mode; and the same three as the self-check runs them, always without autocast."""

_IN_WORDS: dict[PathName, str] = {
    "train": "train path",
    "steady": "train path without dropout and the like",
    "eval": "eval path",
    "check": "self-check",
    "check train": "self-check",
    "check eval": "self-check",
}


@dataclass(frozen=True)
class UserFunctions:
    """The optional functions of a model file, ``f(model, batch)``."""

    forward: BatchFunction | None = None
    loss: BatchFunction | None = None
    metric: BatchFunction | None = None


class Runner:
    """The user's model with the interceptor in place.

    Args:
        model: Already on ``device``.
        layers: Its norm layers.
        functions: The user's own forward, loss and metric.
        device: Where to run.
        autocast: Autocast dtype, or None.

    Attributes:
        held: Modules that the user keeps in eval mode while training.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSet,
        functions: UserFunctions,
        device: torch.device,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.functions = functions
        self.device = device
        self.autocast = autocast
        self._interceptor = Interceptor(layers.layers)
        self._forward = functions.forward or default_forward
        self._last = Pass(images=0, batch_size=0)
        # What is in eval mode beside a root in train mode was put there by the user, to be kept so in training.
        self.held = [module for module in model.modules() if model.training and not module.training]
        self._frozen: frozenset[int] = frozenset()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Keep the hooks in place while the block runs."""
        with self._interceptor.installed(), torch.no_grad(), _eagerly():
            self._set_flags("train")
            # A model whose own train() keeps layers in eval mode trains with them frozen, too.
            self._frozen = frozenset(layer.index for layer in self.layers.layers if not layer.module.training)
            yield

    def forward(self, path: PathName, batch: Any, pass_: Pass) -> tuple[Any, Outputs]:
        """Run the model on a copy of a batch that is on the device, as ``pass_`` says; the moments go there.

        A copy, since a model may write into its input, and every pass is to see the same images.

        Returns:
            What forward returned, and what the model itself returned on the way, for ``call`` to use again.

        Raises:
            UserCodeError: The model or the user's forward raised.
        """
        self._set_flags(path)
        self._last = pass_
        batch = copy_tensors(batch)
        border = model_code(f"calling {describe_call(self._forward, batch)} ({_IN_WORDS[path]})")
        with (
            self._autocast(path),
            self._interceptor.running(pass_),
            recording(self.model, batch) as outputs,
            border,
        ):
            return self._forward(self.model, batch), outputs

    def call(
        self, path: PathName, name: str, function: BatchFunction, batch: Any, outputs: Outputs, pass_: Pass
    ) -> Any:
        """Call the user's loss or metric, right after ``forward`` on the same path.

        The flags are still set, and layers whose statistics that pass chose use the same if the model is called again.
        """
        batch = copy_tensors(batch)
        pass_ = replace(pass_, by_batch=self._last.by_batch, statistics=self._last.statistics)
        border = model_code(f"calling {name}(model, batch) ({_IN_WORDS[path]})")
        with (
            self._autocast(path),
            self._interceptor.running(pass_),
            replaying(self.model, batch, outputs),
            border,
        ):
            return function(self.model, batch)

    def _set_flags(self, path: PathName) -> None:
        self.model.train(path in ("train", "check train"))
        for module in self.held:
            module.training = False
        if path in ("steady", "check"):
            for layer in self.layers.layers:
                layer.module.training = layer.index not in self._frozen

    def _autocast(self, path: PathName) -> AbstractContextManager[Any]:
        if self.autocast is None or path.startswith("check"):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast)


def _eagerly() -> AbstractContextManager[Any]:
    """Run what torch.compile compiled as written: compiled code calls no functional form that could be intercepted."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance

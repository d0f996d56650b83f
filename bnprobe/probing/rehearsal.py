"""Train a copy of the user's model, and see what its layers are asked on the way."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnprobe.errors import ModelError, NonFiniteError, UsageError
from bnprobe.norms import NORMS, NormCall
from bnprobe.probing.batches import copy_tensors, to_device
from bnprobe.probing.forward import model_code
from bnprobe.probing.layers import ROOT, ProbedLayer
from bnprobe.probing.losses import (
    casting,
    held_in_eval,
    require_gradients,
    require_graph,
    require_scalar,
    too_large,
    training_code,
)
from bnprobe.probing.memory import is_out_of_memory
from bnprobe.randomness import preserved_random_state
from bnprobe.stats.moments import pool_moments, row_moments
from bnprobe.usercode import BatchFunction

Answer = Callable[[ProbedLayer, NormCall, Callable[[], Tensor]], Tensor]
"""Called with a layer of the copy, what it asked for, and the call itself; gives the layer's normalized output."""


@contextmanager
def rehearsing() -> Iterator[None]:
    """Keep the random state, have gradients, and run as written what torch.compile compiled."""
    with preserved_random_state(), torch.enable_grad(), _eagerly():
        yield


class Rehearsal:
    """A copy of the user's model in train mode, with the user's loss. The model itself is not touched.

    Args:
        model: The user's model.
        layers: Its norm layers.
        loss: The user's ``loss(model, batch)``.
        option: The option that asks for this, for messages: ``"--train-steps"``.
        device: Where to run.
        autocast: Autocast dtype of the forward pass, or None.
        held: Modules of ``model`` that the user keeps in eval mode while training; None: those in eval mode beside a
            root in train mode.

    Attributes:
        model: The copy.
        layers: The same layers, with the modules of the copy.
        parameters: The copy's trainable parameters.
        autocast: As given.

    Raises:
        UsageError: There is no loss.
        ModelError: The model cannot be copied.
        DeviceError: There is not enough memory.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ProbedLayer],
        loss: BatchFunction | None,
        option: str,
        device: torch.device,
        autocast: torch.dtype | None = None,
        held: Sequence[nn.Module] | None = None,
    ) -> None:
        if loss is None:
            raise UsageError(
                f"{option} needs a loss to train with. Add a function loss(model, batch) to the model file that returns"
                " the training loss as a tensor, or name one under loss in the spec."
            )
        if held is None:
            held = held_in_eval(model)
        self._loss = loss
        self._device = device
        self.autocast = autocast
        self.model = _copied(model, device)
        self.layers = _matched(model, self.model, layers)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._set_flags({name for name, module in _named(model).items() if any(module is each for each in held)})

    def loss(self, batch: Any, answer: Answer) -> Tensor:
        """The user's loss of a micro-batch on the host, a tensor of one number with its graph.

        Raises:
            UserCodeError: The user's loss or model raised.
            UsageError: What the loss returned cannot be trained with.
            DeviceError: There is not enough memory.
        """
        batch = copy_tensors(to_device(batch, self._device))
        border = self._border("calling loss(model, batch) (training a copy)")
        with border, casting(self._device, self.autocast), self._watching(answer):
            value = self._loss(self.model, batch)
        return require_scalar(value)

    def backward(self, value: Tensor, answer: Answer) -> None:
        """The gradients of a loss, in place of those that the parameters have.

        Args:
            value: From ``loss``.
            answer: As for ``loss``: layers inside torch.utils.checkpoint are called again here.

        Raises:
            UserCodeError: A backward function of the user's raised.
            UsageError: The loss does not depend on the copy's parameters.
            DeviceError: There is not enough memory.
        """
        for parameter in self.model.parameters():
            parameter.grad = None
        require_graph(value)
        with self._border("running backward() from loss(model, batch)"), self._watching(answer):
            value.backward()
        require_gradients(self.parameters)

    def require_finite(self, value: Tensor, batch: Any, place: str, remedy: str) -> None:
        """Refuse a loss that is NaN or Inf.

        Args:
            place: Where, for the message: ``"in training step 3 (the first is 1)"``.
            remedy: What to do, a sentence.

        Raises:
            NonFiniteError: Names the first layer whose input is not finite.
        """
        if bool(torch.isfinite(value)):
            return
        bad = self._first_non_finite(batch)
        where = f"The first BN layer with NaN or Inf in its input is {bad}." if bad else _ALL_FINITE
        raise NonFiniteError(f"The loss is {value.item()} {place}. {where} {remedy}")

    def _first_non_finite(self, batch: Any) -> str | None:
        """The forward pass once more, since looking at every input of every step would cost more."""
        found: list[str] = []

        def look(layer: ProbedLayer, call: NormCall, run: Callable[[], Tensor]) -> Tensor:
            if not found and not bool(torch.isfinite(call.input).all()):
                found.append(layer.name)
            return run()

        self.loss(batch, look)
        return found[0] if found else None

    def _set_flags(self, held: set[str]) -> None:
        with model_code("calling model.train()"):
            self.model.train()
        for name, module in _named(self.model).items():
            if name in held:
                module.training = False

    @contextmanager
    def _watching(self, answer: Answer) -> Iterator[None]:
        watch = _Watch(answer)
        with ExitStack() as stack:
            stack.callback(watch.close)
            for layer in self.layers:
                stack.enter_context(watch.hooked(layer))
            yield

    def _border(self, call: str) -> AbstractContextManager[None]:
        return training_code(call, _TRAINING, self._device)


_TRAINING = "Training a copy of the model"

_ALL_FINITE = "The inputs of all BN layers are finite: look at what follows the last of them, and at the loss itself."


def batch_moments(call: NormCall) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a call's input over all its values, float64 of shape (channels,)."""
    with torch.no_grad():
        rows = call.input.detach()
        mean, variance = pool_moments(*row_moments(rows, call.eps), rows.shape[0])
    return mean[0], variance[0]


class _Watch(TorchFunctionMode):
    """Hands the layers' calls of their functional form over; forward hooks tell which layer is calling.

    The mode is on only while a layer runs. Were it on for a whole step, it would be off where torch.utils.checkpoint
    calls layers again: backward() is a function that a mode sees, and it runs without the mode, on another thread.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer
        self._families = {function: family for family in NORMS for function in family.functionals}
        self._callers: list[ProbedLayer] = []
        self._on = ExitStack()

    @contextmanager
    def hooked(self, layer: ProbedLayer) -> Iterator[None]:
        """Hook a layer while the block runs."""
        entering = layer.module.register_forward_pre_hook(lambda module, inputs: self._enter(layer))
        leaving = layer.module.register_forward_hook(lambda module, inputs, output: self._leave(), always_call=True)
        try:
            yield
        finally:
            entering.remove()
            leaving.remove()

    def close(self) -> None:
        """Leave the layers that Ctrl-C ended: it skips their hooks."""
        while self._callers:
            self._leave()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        family = self._families.get(func)
        if family is None:
            return func(*args, **kwargs)
        return self._answer(self._callers[-1], family.parse(*args, **kwargs), lambda: func(*args, **kwargs))

    def _enter(self, layer: ProbedLayer) -> None:
        if not self._callers:  # a layer within a layer: twice on, it would see every call twice
            self._on.enter_context(self)
        self._callers.append(layer)

    def _leave(self) -> None:
        if self._callers:
            self._callers.pop()
            if not self._callers:
                self._on.close()


def _copied(model: nn.Module, device: torch.device) -> nn.Module:
    try:
        return copy.deepcopy(model).to(device)
    except Exception as error:  # whatever the user's classes raise
        if is_out_of_memory(error):
            raise too_large(_TRAINING, device) from error
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and only a copy of it may be"
            " trained. Keep open files, locks and tensors that are no parameters out of its attributes, or give the"
            " class that holds them a __deepcopy__."
        ) from error


def _matched(model: nn.Module, duplicate: nn.Module, layers: Sequence[ProbedLayer]) -> tuple[ProbedLayer, ...]:
    modules = _named(duplicate)
    matched = []
    for layer in layers:
        module = modules.get("" if layer.name == ROOT else layer.name)
        if type(module) is not type(layer.module) or module is None or module is layer.module:
            raise ModelError(
                f"copy.deepcopy of {type(model).__name__} gave no copy of its layer {layer.name}, and only a copy of"
                " the model may be trained. Look at the __deepcopy__ of the model's classes."
            )
        matched.append(replace(layer, module=module, info=layer.family.describe(module)))
    return tuple(matched)


def _named(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def _eagerly() -> AbstractContextManager[Any]:
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance

"""A copy of the user's model in train mode, with the user's loss; and what a loss must return to be trained with."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.errors import DeviceError, ModelError, NonFiniteError, UsageError, message_of
from bnprobe.loading.model import eagerly
from bnprobe.loading.returned import trainable_loss
from bnprobe.measure.batch import copy_tensors, to_device
from bnprobe.measure.hooks import Answer, Interceptor, noting_non_finite
from bnprobe.measure.layers import ProbedLayer
from bnprobe.measure.memory import LESS, is_out_of_memory
from bnprobe.measure.norms import NormCall
from bnprobe.measure.reach import every_module, what_cannot_be_copied
from bnprobe.measure.restore import ModelState, preserved_random_state, set_mode
from bnprobe.measure.session import Session, casting, model_code
from bnprobe.stats.moments import pool_moments, row_moments


@contextmanager
def training() -> Iterator[None]:
    """Preserve the random state, enable gradients, and run compiled modules eagerly."""
    with preserved_random_state(), torch.enable_grad(), eagerly():
        yield


class TrainingCopy:
    """A copy of the user's model in train mode, with the user's loss. The model itself is not touched.

    Args:
        session: The model, and the user's ``loss(model, batch)``.
        option: The option that asks for this, for messages: ``"--train-steps"``.

    Attributes:
        model: The copy.
        layers: The same layers, with the modules of the copy.
        parameters: The copy's trainable parameters.
        autocast: Autocast dtype of the forward pass, or None.

    Raises:
        UsageError: There is no loss.
        ModelError: The model cannot be copied.
        DeviceError: There is not enough memory.
    """

    def __init__(self, session: Session, option: str) -> None:
        if session.functions.loss is None:
            raise UsageError(
                f"{option} needs a loss to train with. Add a function loss(model, batch) to the model file that returns"
                " the training loss as a tensor, or name one under loss in the spec."
            )
        self._loss = session.functions.loss
        self._device = session.device
        self.autocast = session.autocast
        self.model = _copied(session.model, session.device)
        self.layers = _matched(session.model, self.model, session.layers.layers)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._interceptor = Interceptor(self.layers)
        held = {id(module) for module in session.held}
        names = {name for name, module in _named(session.model).items() if id(module) in held}
        with model_code("calling model.train()"):
            set_mode(self.model, True, [module for name, module in _named(self.model).items() if name in names])

    def loss(self, batch: Any, answer: Answer) -> Tensor:
        """The user's loss of a micro-batch on the host, a tensor of one number with its graph.

        Raises:
            UserCodeError: The user's loss or model raised.
            UsageError: What the loss returned cannot be trained with.
            DeviceError: There is not enough memory.
        """
        batch = copy_tensors(to_device(batch, self._device))
        border = self._border("calling loss(model, batch) (training a copy)")
        with border, casting(self._device, self.autocast), self._answering(answer):
            value = self._loss(self.model, batch)
        return trainable_loss(self._loss, value)

    def watching(self) -> AbstractContextManager[None]:
        """Find out what a pass moves, besides what is small; see ``ModelState``."""
        return self._state.watching()

    def put_back(self) -> None:
        """Put the copy's state back to what it was at first, where micro-batches are to meet the same model."""
        self._state.put_back()

    @cached_property
    def _state(self) -> ModelState:
        return ModelState(self.model)

    def backward(self, value: Tensor, answer: Answer) -> None:
        """Compute the gradients of a loss; gradients from before are dropped.

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
        with self._border("running backward() from loss(model, batch)"), self._answering(answer):
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
        # Repeat the forward pass to find the first layer; checking every input of every step would cost more.
        with noting_non_finite((layer.name, layer.module) for layer in self.layers) as found:
            self.loss(batch, lambda call: call.run())
        where = f"The first BN layer with NaN or Inf in its input is {found[0]}." if found else _ALL_FINITE
        raise NonFiniteError(f"The loss is {value.item()} {place}. {where} {remedy}")

    @contextmanager
    def _answering(self, answer: Answer) -> Iterator[None]:
        with self._interceptor.installed(), self._interceptor.answering(answer):
            yield

    def _border(self, call: str) -> AbstractContextManager[None]:
        return training_code(call, _TRAINING, self._device)


_TRAINING = "Training a copy of the model"

_ALL_FINITE = "The inputs of all BN layers are finite: look at what follows the last of them, and at the loss itself."


def call_moments(call: NormCall) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of a call's input over all its values, float64 of shape (channels,)."""
    with torch.no_grad():
        rows = call.input.detach()
        mean, variance = pool_moments(*row_moments(rows, call.eps), rows.shape[0])
    return mean[0], variance[0]


def _copied(model: nn.Module, device: torch.device) -> nn.Module:
    try:
        return copy.deepcopy(model).to(device)
    except Exception as error:  # whatever the user's classes raise
        if is_out_of_memory(error):
            raise too_large(_TRAINING, device) from error
        raise ModelError(
            f"{type(model).__name__} cannot be copied{what_cannot_be_copied(model)} ({type(error).__name__}:"
            f" {message_of(error)}), and bnprobe only trains copies. Keep open files, locks and tensors that are no"
            " parameters out of its attributes, or give the class that holds them a __deepcopy__."
        ) from error


def _matched(model: nn.Module, duplicate: nn.Module, layers: Sequence[ProbedLayer]) -> tuple[ProbedLayer, ...]:
    modules, names = every_module(duplicate), {id(module): name for name, module in every_module(model).items()}
    matched = []
    for layer in layers:
        module = modules.get(names.get(id(layer.module), ""))
        if type(module) is not type(layer.module) or module is None or module is layer.module:
            raise ModelError(
                f"copy.deepcopy of {type(model).__name__} did not copy layer {layer.name}, and bnprobe only trains"
                " copies of the model. Look at the __deepcopy__ of the model's classes."
            )
        info = replace(layer.family.describe(module), eps=layer.info.eps, momentum=layer.info.momentum)
        matched.append(replace(layer, module=module, info=info))
    return tuple(matched)


def _named(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))


def require_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Refuse a backward pass that reached none of the parameters.

    Raises:
        UsageError: No parameter received a gradient.
    """
    if all(parameter.grad is None for parameter in parameters):
        raise UsageError(
            "No parameter received a gradient: loss(model, batch) must call the model that it is given, not"
            " another one."
        )


@contextmanager
def training_code(call: str, what: str, device: torch.device) -> Iterator[None]:
    """Turn errors of the user's code in training into bnprobe's own; running out of memory is a DeviceError.

    Args:
        call: As in ``model_code``.
        what: What does not fit, e.g. "Training a copy of the model".

    Raises:
        UserCodeError: The user's code raised.
        DeviceError: There is not enough memory.
    """
    try:
        with model_code(call):
            yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise too_large(what, device) from error


def too_large(what: str, device: torch.device) -> DeviceError:
    """One micro-batch is too large for the memory of the device."""
    return DeviceError(f"{what} on one micro-batch does not fit into the memory of {device}. {LESS}")

"""Hooks on the norm layers: which layer is calling its functional form, and who answers.

``Interceptor`` stands between the layers and their functional form.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnprobe.errors import ModelError, is_library_file
from bnprobe.measure.batch import is_finite, tensors_of
from bnprobe.measure.keepers import set_flag
from bnprobe.measure.layers import ProbedLayer
from bnprobe.measure.norms import NORMS, FunctionFamily, NormCall, NormFamily, WholeModule, place_of
from bnprobe.wording import option


@dataclass(frozen=True)
class Intercepted:
    """A call of a functional form, made by a layer.

    Attributes:
        layer: The layer that is calling.
        family: The family whose functional form was called.
        call: Its arguments.
        run: Makes the call as it stands.
    """

    layer: ProbedLayer
    family: NormFamily
    call: NormCall
    run: Callable[[], Tensor]


Answer = Callable[[Intercepted], Tensor]
"""Gives the normalized output of an intercepted call."""


class Watch(Protocol):
    """Sees the calls of ``F.batch_norm`` in a pass."""

    def known(self, found: Intercepted) -> None:
        """Take note of a layer's call, which is answered afterwards."""

    def unknown(self, call: NormCall, run: Callable[[], Tensor]) -> Tensor:
        """Answer a call of no layer; ``run`` makes it as it stands."""


class Interceptor(TorchFunctionMode):
    """Hands the layers' calls of their functional form to an answer.

    A call belongs to the layer whose running mean it is given, by its memory; where that says nothing, to the layer
    that is running, which forward hooks tell.

    Attributes:
        named: The memory of the statistics of layers that are skipped by name.
    """

    def __init__(self, layers: Sequence[ProbedLayer]) -> None:
        super().__init__()
        self.named: frozenset[tuple[int, int, int] | None] = frozenset()
        self._families = {function: family for family in NORMS for function in family.functionals}
        self._callers: list[ProbedLayer] = []
        self._answer: Answer | None = None
        self._entered: Callable[[ProbedLayer], None] | None = None
        self._outside: Callable[[tuple[str, str]], None] | None = None
        self._watch: Watch | None = None
        self._on = ExitStack()
        self._hooks = ExitStack()
        self._installed = False
        self.layers = layers

    @property
    def layers(self) -> Sequence[ProbedLayer]:
        """The layers; where hooks are installed, setting them moves the hooks."""
        return self._layers

    @layers.setter
    def layers(self, layers: Sequence[ProbedLayer]) -> None:
        self._layers = layers
        means = [(place_of(layer.info.running_mean), layer) for layer in reversed(layers)]
        self._owners = {place: layer for place, layer in means if place is not None}
        if self._installed:
            self._hook()

    def __deepcopy__(self, memo: dict[int, Any]) -> Interceptor:
        """Copying a model copies its hooks; those that are ours do nothing on the copy."""
        return self

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hook the layers, and remove the hooks afterwards."""
        self._installed = True
        try:
            self._hook()
            yield
        finally:
            self._installed = False
            self._hooks.close()

    def _hook(self) -> None:
        self._hooks.close()
        for layer in self._layers:
            module, add = layer.module, self._hooks.callback
            if isinstance(layer.family, WholeModule):
                around = _Around(self, layer, layer.family)
                add(module.register_forward_pre_hook(around.before, with_kwargs=True).remove)
                add(module.register_forward_hook(around.after, always_call=True).remove)
            else:
                add(module.register_forward_pre_hook(self._entering(layer)).remove)
                add(module.register_forward_hook(self._left, always_call=True).remove)

    @contextmanager
    def answering(
        self,
        answer: Answer,
        entered: Callable[[ProbedLayer], None] | None = None,
        outside: Callable[[tuple[str, str]], None] | None = None,
        watch: Watch | None = None,
    ) -> Iterator[None]:
        """Let ``answer`` give the outputs of the layers while the block runs; the hooks are installed.

        Without ``outside`` the mode is on only while a layer runs. Were it on for a whole training step, it would be
        off where torch.utils.checkpoint calls layers again: backward() is a function that a mode sees, and it runs
        without the mode, on another thread.

        Args:
            answer: Called with every call of a layer.
            entered: Called with every layer whose forward begins.
            outside: Called with the line of user code that calls a functional form outside any layer on the statistics
                of its batch, and with why this is the call of none.
            watch: Sees the calls of ``F.batch_norm``; those outside any layer only where ``outside`` is given.
        """
        self._answer, self._entered, self._outside, self._watch = answer, entered, outside, watch
        self._callers.clear()
        try:
            with self if outside is not None else ExitStack():
                yield
        finally:
            self._callers.clear()  # Ctrl-C skips the hooks of the layers that it ends
            self._on.close()
            self._answer = self._entered = self._outside = self._watch = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        family = self._families.get(func)
        if family is None or self._answer is None:
            return func(*args, **kwargs)
        call = family.parse(*args, **kwargs)
        layer = self._layer_of(call)
        watch = self._watch if F.batch_norm in family.functionals else None
        if layer is None and watch is not None:
            return watch.unknown(call, lambda: func(*args, **kwargs))
        if layer is None:
            if self._outside is not None and call.training and place_of(call.running_mean) not in self.named:
                self._outside((calling_line(), why_outside(call)))
            return func(*args, **kwargs)
        if call.masked:
            raise ModelError(
                f"{layer.name} is called with a mask, which a scan does not know: it would measure the padding, too."
                f" Leave the layer out: {option('--exclude', [layer.name])}."
            )
        if self._entered is not None and isinstance(layer.family, FunctionFamily):
            self._entered(layer)
        found = Intercepted(layer, family, call, lambda: func(*args, **kwargs))
        if watch is not None:
            watch.known(found)
        return self._answer(found)

    def answered(self, found: Intercepted) -> Tensor:
        """The answer to a call that is no function; its input where nothing answers."""
        if self._answer is None:
            return found.call.input
        if self._entered is not None:
            self._entered(found.layer)
        answer, self._answer = self._answer, None  # it may call batch_norm itself
        try:
            return answer(found)
        finally:
            self._answer = answer

    def _layer_of(self, call: NormCall) -> ProbedLayer | None:
        running = self._callers[-1] if self._callers else None
        place = place_of(call.running_mean)
        if place is None or (running is not None and place_of(running.info.running_mean) == place):
            found = running
        else:
            found = self._owners.get(place, running)
        # A module around batch_norm functions owns the calls on its own buffers, and no others.
        return None if found is running and found is not None and not _owns(found, place) else found

    def _entering(self, layer: ProbedLayer) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            # A layer within a layer: with the mode on twice, every call would be seen twice.
            if self._answer is not None and self._outside is None and not self._callers:
                self._on.enter_context(self)
            self._callers.append(layer)
            if self._entered is not None and not isinstance(layer.family, FunctionFamily):
                self._entered(layer)

        return hook

    def _left(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._callers:
            self._callers.pop()
            if not self._callers:
                self._on.close()


def why_outside(call: NormCall) -> str:
    """Why a call of a functional form that normalizes with its batch is that of no layer, a clause."""
    if call.running_mean is not None:
        return (
            "batch_norm called as a function with running statistics that are no buffers of a module, but copies or"
            " computed: give it the buffers themselves"
        )
    if call.input.shape[0] == 1:
        return "instance norm by batch_norm called as a function: every sample by itself, in both modes"
    return "batch_norm called as a function without running statistics: those of its batch, in both modes"


def _owns(layer: ProbedLayer, place: tuple[int, int, int] | None) -> bool:
    return not isinstance(layer.family, FunctionFamily) or place_of(layer.info.running_mean) == place


class _Around:
    """Hooks of a layer that normalizes by arithmetic of its own: its input is answered, not a function that it calls.

    The module runs in eval mode on an input that makes its output what the answer asks for, see ``WholeModule``.
    """

    def __init__(self, interceptor: Interceptor, layer: ProbedLayer, family: WholeModule) -> None:
        self._interceptor, self._layer, self._family = interceptor, layer, family
        self._training: bool | None = None

    def before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self._training = module.training
        found = self._family.input_of(args, kwargs)
        if found is None:
            return None
        call = self._family.call(module, found)
        output = self._interceptor.answered(Intercepted(self._layer, self._family, call, lambda: call.input))
        if output is call.input:  # to run as it stands
            return None
        set_flag(module, False)
        return self._family.with_input(args, kwargs, output)

    def after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._training is not None:
            set_flag(module, self._training)


@contextmanager
def noting_non_finite(layers: Iterable[tuple[str, nn.Module]]) -> Iterator[list[str]]:
    """Watch the inputs of layers, given with their names, while the block runs.

    Yields:
        A list that gets the name of the first layer that is called on NaN or Inf.
    """
    found: list[str] = []

    def watching(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            if not found and not is_finite(tensors_of(list(inputs))):
                found.append(name)

        return hook

    with ExitStack() as stack:
        for name, module in layers:
            stack.callback(module.register_forward_pre_hook(watching(name)).remove)
        yield found


def calling_line() -> str:
    """File and line of the user's code that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library_file(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "unknown place"

"""The loss that a training loop computes from the model's outputs, once more from other outputs.

The loop is the user's own, and says nowhere what its loss is. What it computes between the model's forward and
``backward()`` is a chain of torch's functions, which a mode can see: it is written down, and run again on the outputs
of the same batches in eval mode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from bnprobe.measure.batch import map_leaves, tensors_of
from bnprobe.measure.restore import preserved_random_state

_KEEPING = ("batch_norm", "instance_norm")
"""Names of functions that write into running statistics, which their versions do not show."""

_MOST_NODES = 100_000
"""Of a graph that is searched for outputs."""

_SCALING = GradScaler.scale.__code__
"""What multiplies a loss for the sake of its gradients: that is none of the loss."""


@dataclass
class _Known:
    """A tensor that was computed from outputs.

    Attributes:
        tensor: The loop's own, kept so that no other one gets its identity.
        calls: Numbers of the calls of the model that it was computed from.
        value: The same in eval mode, once it is computed.
    """

    tensor: Tensor
    calls: frozenset[int]
    value: Tensor | None = None


@dataclass(frozen=True)
class _Step:
    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    result: Any
    others: list[Tensor]
    versions: list[int]


class LossTape(TorchFunctionMode):
    """Writes down what is computed from the outputs of calls of a model until ``backward()``.

    Functions of other tensors are not written down. What cannot run twice gives no loss: what writes into a tensor that
    is not itself computed from outputs (a running total, the running statistics of a layer behind the model), what is
    computed from that, and what raises on the outputs in eval mode.

    Args:
        found: Called before each ``backward()`` of what was computed from outputs, with the loss in train and in eval
            mode, scalars on the device; with None where it cannot be computed again.
    """

    _silent = False

    def __init__(self, found: Callable[[tuple[Tensor, Tensor] | None], None]) -> None:
        super().__init__()
        self._found = found
        self._known: dict[int, _Known] = {}
        self._lost: dict[int, ref[Tensor]] = {}
        self._steps: list[_Step] = []
        self._scaled: dict[int, tuple[Tensor, Tensor]] = {}
        self._nodes: set[Any] = set()
        self._number = 0

    @staticmethod
    @contextmanager
    def silence() -> Iterator[None]:
        """No tape writes anything down while the block runs: it is none of the loop's."""
        before, LossTape._silent = LossTape._silent, True
        try:
            yield
        finally:
            LossTape._silent = before

    def enter(self) -> bool:
        """Begin, or go on; False within a mode that the user may leave before this one ends: then it is not on."""
        known = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)  # of torch.set_default_device
        if any(not isinstance(mode, LossTape) and mode is not known for mode in _get_current_function_mode_stack()):
            return False
        torch._C._push_on_torch_function_stack(self)
        return True

    def leave(self) -> None:
        """Pause, or end; modes that were entered meanwhile stay. Not from within a function that it sees."""
        if self not in _get_current_function_mode_stack():  # of this thread
            return
        above: list[Any] = []
        while (mode := torch._C._pop_torch_function_stack()) is not self:
            above.append(mode)
        for mode in reversed(above):
            torch._C._push_on_torch_function_stack(mode)

    def in_eval(self, inputs: Any) -> Any:
        """What the coming call of the model would get, had the calls before it been in eval mode; None: not known."""
        given = tensors_of(inputs)
        if not any(id(tensor) in self._known or self._is_lost(tensor) for tensor in given):
            return inputs
        self._catch_up()
        return None if any(map(self._is_lost, given)) else map_leaves(inputs, self._value_of)

    def add(self, inputs: Any, outputs: Any, others: Any) -> None:
        """Take in a call: what it got, what it returned, and what it returns in eval mode; None: not known."""
        behind = [known.calls for tensor in tensors_of(inputs) if (known := self._known.get(id(tensor)))]
        calls = frozenset({self._number}).union(*behind)
        self._number += 1
        new, values = tensors_of(outputs), tensors_of(others)
        self._nodes |= {tensor.grad_fn for tensor in new if tensor.grad_fn is not None}
        if [tensor.shape for tensor in new] != [tensor.shape for tensor in values]:
            self._lose(new)
            return
        self._known |= {id(one): _Known(one, calls, other) for one, other in zip(new, values, strict=True)}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or LossTape._silent:
            return func(*args, **kwargs)
        if func is Tensor.backward:
            self._find(args[0], keeps_graph=bool(kwargs.get("retain_graph") or kwargs.get("create_graph")))
            return func(*args, **kwargs)
        given = tensors_of([args, kwargs])
        known = [self._known[id(tensor)] for tensor in given if id(tensor) in self._known]
        is_lost = any(map(self._is_lost, given))
        if not known and not is_lost:
            return func(*args, **kwargs)
        others = [tensor for tensor in given if id(tensor) not in self._known]
        versions = [_version(tensor) for tensor in others]
        is_lost = is_lost or any(map(self._comes_from_outputs, others))
        is_scaling = sys._getframe(1).f_code is _SCALING
        result = func(*args, **kwargs)
        new = tensors_of(result)
        changed = [tensor for tensor, before in zip(others, versions, strict=True) if _version(tensor) != before]
        if is_lost or changed or getattr(func, "__name__", "").endswith(_KEEPING):
            self._lose([*new, *changed])
        elif is_scaling:
            self._scaled |= {id(tensor): (tensor, args[0]) for tensor in new}
        elif new:
            self._steps.append(_Step(func, args, kwargs, result, others, versions))
            calls = frozenset().union(*(each.calls for each in known))
            self._known |= {id(tensor): _Known(tensor, calls) for tensor in new if id(tensor) not in self._known}
        return result

    def _find(self, loss: Tensor, keeps_graph: bool) -> None:
        _, loss = self._scaled.get(id(loss), (loss, loss))
        with LossTape.silence():
            self._catch_up()
            known = self._known.get(id(loss))
            if known is None:
                if self._is_lost(loss) or self._comes_from_outputs(loss):
                    self._found(None)
                return
            value = known.value
            is_known = value is not None and loss.numel() == value.numel() == 1
            self._found((loss.detach().clone(), value.detach()) if value is not None and is_known else None)
        if not keeps_graph:  # nothing else that these calls gave can be differentiated any more
            freed = [each.tensor for each in self._known.values() if each.calls & known.calls]
            self._lose(freed)
            self._scaled.clear()

    def _catch_up(self) -> None:
        """Run what was written down, on the values in eval mode."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        with LossTape.silence(), torch.no_grad(), preserved_random_state():
            for step in steps:
                new = tensors_of(step.result)
                try:
                    if step.versions != [_version(tensor) for tensor in step.others]:
                        raise RuntimeError("changed since")
                    if any(map(self._is_lost, tensors_of([step.args, step.kwargs]))):
                        raise RuntimeError("computed from what is lost")
                    args, kwargs = map_leaves(step.args, self._value_of), map_leaves(step.kwargs, self._value_of)
                    values = tensors_of(step.function(*args, **kwargs))
                    for tensor, value in zip(new, values, strict=True):
                        self._known[id(tensor)].value = value
                except Exception:  # of outputs that differ in eval mode: then there is no loss of them
                    self._lose(new)

    def _comes_from_outputs(self, tensor: Tensor) -> bool:
        """Whether outputs are in the graph of a tensor that no function gave that was seen, as of a compiled loss."""
        if tensor.grad_fn is None:
            return False
        seen, waiting = set[Any](), [tensor.grad_fn]
        while waiting and len(seen) < _MOST_NODES:
            node = waiting.pop()
            if node in self._nodes:
                return True
            if node not in seen:
                seen.add(node)
                waiting += [before for before, _ in node.next_functions if before is not None]
        return False

    def _value_of(self, leaf: Any) -> Any:
        known = self._known.get(id(leaf)) if isinstance(leaf, Tensor) else None
        return leaf if known is None else known.value

    def _lose(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self._known.pop(id(tensor), None)
            self._lost[id(tensor)] = ref(tensor)

    def _is_lost(self, tensor: Tensor) -> bool:
        known = self._lost.get(id(tensor))
        return known is not None and known() is tensor


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version

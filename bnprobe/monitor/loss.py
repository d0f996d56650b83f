"""The loss that a training loop computes from the model's outputs, once more from other outputs.

The loop is the user's own, and says nowhere what its loss is. What it computes between the model's forward and
``backward()`` is a chain of torch's functions, which a mode can see: it is written down, and run again on the outputs
of the same batch in eval mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from bnprobe.measure.batch import map_leaves, tensors_of
from bnprobe.measure.restore import preserved_random_state

_KEEPING = ("batch_norm", "instance_norm")
"""Names of functions that write into running statistics, which their versions do not show."""


@dataclass(frozen=True)
class _Call:
    function: Callable[..., Any]
    args: Any
    kwargs: dict[str, Any]
    result: Any


class LossTape(TorchFunctionMode):
    """Writes down what is computed from the outputs, from ``start`` on until ``backward()``.

    Calls that do not depend on the outputs are not written down. What writes into a tensor that is not itself computed
    from the outputs (a running total, the running statistics of a layer behind the model) cannot run twice: it is left
    out, and so is all that is computed from what it gives.

    Args:
        outputs: What the model returned.
        others: The same, in eval mode.
        found: Called with the loss of both, scalars on the device, once ``backward()`` is called on a scalar that was
            computed from the outputs by what was written down.
    """

    def __init__(self, outputs: Any, others: Any, found: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        pairs = list(zip(tensors_of(outputs), tensors_of(others), strict=False))
        self._fits = all(one.shape == other.shape for one, other in pairs) and bool(pairs)
        # The tensors of the loop are kept, so that no other one gets the identity of one that is gone.
        self._known: dict[int, tuple[Tensor, Tensor | None]] = {id(one): (one, other) for one, other in pairs}
        self._calls: list[_Call] = []
        self._found = found
        self._on = self._writes = False

    def start(self) -> None:
        """Begin; not within another mode, which the user may leave before this one ends."""
        if self._fits and not _get_current_function_mode_stack():
            torch._C._push_on_torch_function_stack(self)
            self._on = self._writes = True

    def drop(self) -> None:
        """Write down no more, and forget what there is: the loss is of other outputs, too."""
        self._writes = False
        self._known.clear()
        self._calls.clear()

    def stop(self) -> None:
        """Leave the mode, not from within a function that it sees; modes that were entered meanwhile stay."""
        if self._on:
            self._on = False
            above: list[Any] = []
            while (mode := torch._C._pop_torch_function_stack()) is not self:
                above.append(mode)
            for mode in reversed(above):
                torch._C._push_on_torch_function_stack(mode)
        self.drop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self._writes:
            return func(*args, **kwargs)
        if func is Tensor.backward:
            self._find(args[0])
            return func(*args, **kwargs)
        given = tensors_of([args, kwargs])
        if not any(id(tensor) in self._known for tensor in given):
            return func(*args, **kwargs)
        others = [tensor for tensor in given if id(tensor) not in self._known]
        if getattr(func, "__name__", "").endswith(_KEEPING):
            return func(*args, **kwargs)
        versions = [_version(tensor) for tensor in others]
        result = func(*args, **kwargs)
        new = tensors_of(result)
        if new and versions == [_version(tensor) for tensor in others]:
            self._calls.append(_Call(func, args, kwargs, result))
            self._known |= {id(tensor): (tensor, None) for tensor in new if id(tensor) not in self._known}
        return result

    def _find(self, loss: Any) -> None:
        known, calls = dict(self._known), list(self._calls)
        self.drop()
        if not isinstance(loss, Tensor) or loss.numel() != 1 or id(loss) not in known:
            return
        values = {key: other for key, (_, other) in known.items() if other is not None}

        def other(leaf: Any) -> Any:
            return values.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf

        try:
            with torch.no_grad(), preserved_random_state():
                for call in calls:
                    result = call.function(*map_leaves(call.args, other), **map_leaves(call.kwargs, other))
                    pairs = zip(tensors_of(call.result), tensors_of(result), strict=True)
                    values |= {id(before): after for before, after in pairs}
        except Exception:  # of outputs that differ in eval mode: then there is no loss of them
            return
        if id(loss) in values:
            self._found(loss.detach().clone(), values[id(loss)].detach())


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version

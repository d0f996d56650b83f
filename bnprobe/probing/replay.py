"""Use recorded outputs of the model again, so that a loss or metric costs no further forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bnprobe.probing.batches import leaves_of, map_leaves, tensors_of

Outputs = dict[tuple[int, ...], Any]
"""Outputs of the model, by the positions in the batch of the tensors that it was called on."""


@contextmanager
def recording(model: nn.Module, batch: Any) -> Iterator[Outputs]:
    """Keep what the model returns while the block runs, where it is called on tensors of the batch themselves."""
    outputs: Outputs = {}
    versions: dict[tuple[int, ...], list[int]] = {}

    def answer(original: Callable[..., Any], key: tuple[int, ...] | None, args: Any, kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if key is not None:
            outputs[key], versions[key] = output, _versions(output)
        return output

    with _intercepted(model, batch, answer):
        yield outputs
    for key in [key for key in outputs if _versions(outputs[key]) != versions[key]]:
        del outputs[key]  # changed in place since: no longer what the model returned


@contextmanager
def replaying(model: nn.Module, batch: Any, outputs: Outputs) -> Iterator[None]:
    """Answer calls of the model on the same tensors of ``batch`` with ``outputs``; all other calls run."""

    def answer(original: Callable[..., Any], key: tuple[int, ...] | None, args: Any, kwargs: Any) -> Any:
        return outputs[key] if key in outputs else original(*args, **kwargs)

    with _intercepted(model, batch, answer):
        yield


def rows_of(outputs: Outputs, start: int, stop: int, images: int) -> Outputs:
    """Copies of the outputs of some of the images; outputs that do not divide by image are left out.

    Copies, since a loss may write into what it gets, and the recorded outputs are still to be compared.
    """
    whole = (start, stop) == (0, images)
    return {
        key: map_leaves(output, lambda leaf: (leaf if whole else leaf[start:stop]).clone())
        for key, output in outputs.items()
        if all(isinstance(leaf, Tensor) and (whole or _has_rows(leaf, images)) for leaf in leaves_of(output))
    }


def _versions(output: Any) -> list[int]:
    """How often each tensor was changed in place; inference tensors do not count, and cannot be compared."""
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors_of(output)]


def _has_rows(tensor: Tensor, images: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == images


@contextmanager
def _intercepted(model: nn.Module, batch: Any, answer: Callable[..., Any]) -> Iterator[None]:
    positions = {id(tensor): position for position, tensor in enumerate(tensors_of(batch))}
    original = model.forward
    had_own = "forward" in model.__dict__

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = [positions.get(id(leaf)) if isinstance(leaf, Tensor) else None for leaf in leaves_of((args, kwargs))]
        known = tuple(position for position in given if position is not None)
        return answer(original, known if given and len(known) == len(given) else None, args, kwargs)

    model.forward = forward
    try:
        yield
    finally:
        if had_own:
            model.forward = original
        else:
            del model.forward

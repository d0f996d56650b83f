"""Everything about a model and the process that a scan might change, as comparable values."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Bits of all tensors, every attribute of every module, random state and grad mode."""
    modules = {name: _module(module) for name, module in model.named_modules(remove_duplicate=False)}
    return {
        **{f"module {name}": content for name, content in modules.items()},
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tobytes(),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "cuda": [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "grad mode": torch.is_grad_enabled(),
    }


def _module(module: nn.Module) -> dict[str, Any]:
    attributes = {key: _value(value) for key, value in module.__dict__.items()}
    return {"class": type(module), "id": id(module), **attributes}


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, dict):
        return id(value), type(value), [(key, _value(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return id(value), type(value), [_value(item) for item in value]
    if isinstance(value, set):
        return id(value), set(value)
    return value


def _tensor(tensor: Tensor) -> Any:
    if is_lazy(tensor):
        return id(tensor), type(tensor)
    data = tensor.detach().cpu().contiguous()
    grad = tensor.grad if tensor.is_leaf else None
    return {
        "id": id(tensor),
        "class": type(tensor),
        "storage": tensor.data_ptr(),
        "shape": tuple(tensor.shape),
        "stride": tensor.stride(),
        "dtype": tensor.dtype,
        "device": tensor.device,
        "bits": data.view(torch.uint8).numpy().tobytes() if data.numel() and data.dim() else data.numpy().tobytes(),
        "requires_grad": tensor.requires_grad,
        "grad": None if grad is None else (id(grad), grad.detach().cpu().numpy().tobytes()),
    }

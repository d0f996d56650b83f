"""Subclasses that do more than normalize: what they do is found by trying, and carried over or refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.nn.batch_renorm import BatchRenormBase
from bnprobe.nn.frozen import FrozenBatchNorm
from bnprobe.nn.gated import GatedBatchNorm
from bnprobe.nn.instance_renorm import InstanceRenorm
from bnprobe.randomness import preserved_random_state
from bnprobe.repairs.build import space_dimensions

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
"""What a module keeps its hooks in."""

_OURS = (BatchRenormBase, FrozenBatchNorm, GatedBatchNorm, InstanceRenorm)
_PLAIN_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, *(ours.forward for ours in _OURS))
_PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_SIDE = {1: 16, 2: 8, 3: 4}
_TOLERANCE = 1e-5
"""Of the probe, relative to the largest output: float32 does no better, and no activation passes for so little."""


def apply_children(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Forward hook of a replacement: what the subclass applied after normalizing, in the order it was registered."""
    for child in module.children():
        output = child(output)
    return output


def normalizes_only(module: _BatchNorm) -> bool:
    """Whether the layer's forward is one that is known to normalize and do no more, and its modes are torch's."""
    kind = type(module)
    known = kind.forward in _PLAIN_FORWARDS
    return (
        known and kind.__call__ is nn.Module.__call__ and kind.train is nn.Module.train and kind.eval is nn.Module.eval
    )


def further_work(module: _BatchNorm) -> tuple[bool, str | None]:
    """Whether a layer applies its children after normalizing; and why it cannot be taken apart, or None.

    A subclass with a forward (or train, eval) of its own is run on random values, in eval and in train mode, and
    compared with BN alone and with BN followed by its children; copies are run, on the CPU, and the random state comes
    back.
    """
    if normalizes_only(module):
        return False, None
    try:
        for children in (True, False):
            if _is_bn_with_children(module, children):
                return children, None
    except Exception as error:  # the user's own code, which need not like random values
        return (
            False,
            f"has a forward of its own, which failed on a random input ({type(error).__name__}: {error})",
        )
    return False, "does something else than normalize and then apply its child modules, which would be lost"


@torch.no_grad()
def _is_bn_with_children(module: _BatchNorm, children: bool) -> bool:
    values = _random_input(module)
    modes = (False,) if isinstance(module, nn.SyncBatchNorm) else (False, True)  # which trains on CUDA alone
    for training in modes:
        own, plain = bare_copy(module), _plain_twin(module, children)
        outputs = [_run(layer.train(training), values) for layer in (own, plain)]
        if not all(map(_alike, [outputs[0], *own.buffers(False)], [outputs[1], *plain.buffers(False)])):
            return False
    return True


def bare_copy(module: _BatchNorm) -> _BatchNorm:
    """A copy on the CPU in float32, without hooks: these may hold on to the whole model."""
    kept = [vars(module).get(name) for name in HOOKS]
    memo: dict[int, Any] = {id(hooks): OrderedDict() for hooks in kept if isinstance(hooks, dict)}
    return copy.deepcopy(module, memo).to("cpu", torch.float32)


def _plain_twin(module: _BatchNorm, children: bool) -> nn.Module:
    """nn.BatchNorm in the same state, followed by copies of the layer's children."""
    own = bare_copy(module)
    twin = _PLAIN[space_dimensions(module) or 2](own.num_features, own.eps, own.momentum, affine=False)
    twin.track_running_stats = own.track_running_stats
    for name, value in (*own._parameters.items(), *own._buffers.items()):
        setattr(twin, name, value)
    for name, child in own.named_children() if children else ():
        twin.add_module(name, child)
    twin.register_forward_hook(apply_children)
    return twin


def _random_input(module: _BatchNorm) -> Tensor:
    """Values twice as wide as the layer is used to, so that its activation shows."""
    space = space_dimensions(module) or 2
    generator = torch.Generator().manual_seed(0)
    shape = (4, module.num_features, *[_SIDE[space]] * space)
    values = 2 * torch.randn(shape, generator=generator)
    if module.running_mean is None or module.running_var is None:
        return values
    mean, variance = (
        torch.nan_to_num(buffer.detach().float().cpu()).view(-1, *[1] * space)
        for buffer in (module.running_mean, module.running_var)
    )
    return values * variance.clamp(min=0).sqrt() + mean


def _run(layer: nn.Module, values: Tensor) -> Tensor:
    with preserved_random_state():
        torch.manual_seed(0)
        output: Tensor = layer(values.clone())
    return output


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    scale = float(torch.nan_to_num(b.float()).abs().max()) if b.numel() else 0.0
    return torch.allclose(a.float(), b.float(), rtol=0, atol=_TOLERANCE * scale + 1e-30, equal_nan=True)

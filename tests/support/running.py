"""A session with its hooks in place, for tests of what runs inside a scan; and networks only a little wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.config.spec import ScanSettings
from bnprobe.measure.physical_batch import Emulation, not_emulated, self_check
from bnprobe.measure.session import Session, UserFunctions

REAL = not_emulated("Switched off.")


def session_of(
    model: nn.Module, functions: UserFunctions | None = None, autocast: str | None = None, device: str = "cpu"
) -> Session:
    """A session with all layers of a model."""
    return Session.open(model, ScanSettings(device=device, autocast=autocast), functions)


@contextmanager
def running(
    model: nn.Module,
    batches: Sequence[Any],
    batch_size: int,
    functions: UserFunctions | None = None,
    autocast: str | None = None,
) -> Iterator[tuple[Session, Emulation]]:
    """The installed session, and what the self-check says of the first two micro-batches."""
    session = session_of(model, functions, autocast)
    with session.installed():
        yield session, self_check(session, list(batches[:2]), batch_size)[0]


def norms(model: nn.Module) -> list[_BatchNorm]:
    """The BN layers, in the order of their indices."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def moderately_off(
    model: nn.Module, batches: Sequence[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> nn.Module:
    """Running statistics near those of the data: means off by a tenth of a standard deviation, variances by 20%."""
    generator = torch.Generator().manual_seed(1)
    for norm in norms(model):
        norm.momentum = None
        norm.reset_running_stats()
    model.train()
    with torch.no_grad():
        for batch in batches:
            (forward or first_input)(model, batch)
    for norm in norms(model):
        noise = torch.randn(2, norm.num_features, generator=generator)
        norm.running_mean += 0.1 * norm.running_var.sqrt() * noise[0]
        norm.running_var *= (0.2 * noise[1]).exp()
    return model


def first_input(model: nn.Module, batch: Any) -> Any:
    """The model on a tensor, or on the first item of a tuple."""
    return model(batch if isinstance(batch, Tensor) else batch[0])


def twin_of(model: nn.Module, *training: int) -> nn.Module:
    """A copy in eval mode but for the BN layers of these indices."""
    twin = copy.deepcopy(model).eval()
    for index in training:
        norms(twin)[index].train()
    return twin

"""The arguments of the functions of Python, checked together before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from bnprobe.config.load import settings_from, shown
from bnprobe.config.spec import ScanSettings
from bnprobe.errors import BnprobeError, DeviceError, UsageError
from bnprobe.wording import given, option


def require_model(model: object) -> None:
    """Refuse what is no model.

    Raises:
        UsageError: Says what it is.
    """
    if problems := _of_model(model):
        raise UsageError(problems[0])


def check_call(
    model: object, functions: Mapping[str, object], settings: Mapping[str, Any], called: Callable[..., Any]
) -> ScanSettings:
    """The settings of a call, once its arguments are known to be right.

    Args:
        model: What was given as the model.
        functions: The user's functions by argument; None: not given.
        settings: Fields of ``ScanSettings`` by argument; None: not given.
        called: The function that was called, whose arguments are known.

    Raises:
        UsageError: Names every argument that is wrong or missing.
        DeviceError: Only the device is not there.
    """
    problems: list[BnprobeError] = [*map(UsageError, _of_model(model)), *map(UsageError, _of_functions(functions))]
    found, name = None, settings.get("device")
    try:
        found = settings_from(settings, called)
    except UsageError as error:
        problems.append(error)
    try:
        device_named(name if isinstance(name, str) else "auto", nn.Module())
    except DeviceError as error:
        problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems or found is None:
        raise UsageError("\n".join(map(str, problems)))
    return found


def _of_model(model: object) -> list[str]:
    if isinstance(model, nn.Module):
        return []
    what = " (an instance, not the class: call it)" if isinstance(model, type) else ""
    return [f"Expected a torch.nn.Module for model, but got {shown(model)}{what}."]


def _of_functions(functions: Mapping[str, object]) -> Iterable[str]:
    for name, function in functions.items():
        if function is not None and not callable(function):
            yield f"Expected a function for {name}, but got {shown(function)}."


def device_named(name: str, model: nn.Module) -> torch.device:
    """The device asked for; "auto" is the model's own, or CUDA where the model is on the CPU and CUDA is there.

    Raises:
        DeviceError: It is not there.
    """
    own = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    if name == "auto":
        return torch.device("cuda") if own.type == "cpu" and torch.cuda.is_available() else own
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError) as error:
        have = f"cuda:0 to cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "no CUDA device"
        raise DeviceError(
            f"The device {name!r} cannot be used: {str(error).splitlines()[0]}. This machine has cpu and {have};"
            f" use {option('--device', 'cpu')}."
        ) from None
    return device


def lacking(settings: ScanSettings, loss: object, metric: object, held_out: object) -> list[str]:
    """What was asked for and cannot be measured without a function or data that is None, a sentence each."""
    lacks = [
        f"{option(asked)} needs a loss: give {given('loss')}."
        for asked, wanted in (("--train-steps", settings.train_steps), ("--gradients", settings.gradients))
        if wanted and loss is None
    ]
    if settings.what_if and loss is None and metric is None:
        lacks.append(f"{option('--what-if')} needs a loss or a metric: give {given('scores')}.")
    if settings.what_if and held_out is None:
        lacks.append(f"{option('--what-if')} needs held-out data: give {given('held-out data')}.")
    return lacks

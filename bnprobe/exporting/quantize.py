"""8-bit post-training quantization with torch.ao, calibrated on the user's batches."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from bnprobe.errors import RepairError
from bnprobe.exporting.interface import Arguments, root_cause

_MODULE = "torch.ao.quantization.quantize_fx"


def quantized(model: nn.Module, batches: Sequence[Arguments]) -> nn.Module:
    """A copy with 8-bit weights and activations wherever torch has kernels for them on this machine.

    BN layers are folded into the preceding convolutions, with their running statistics.

    Args:
        model: The model, in eval mode on the CPU.
        batches: Batches to calibrate the ranges of activations on.

    Raises:
        RepairError: This version of torch has no torch.ao quantization, or it does not support the model.
    """
    if importlib.util.find_spec("torch.ao.quantization") is None or importlib.util.find_spec(_MODULE) is None:
        raise RepairError(
            f"--quantize needs {_MODULE}, which this torch ({torch.__version__}) does not have. Leave it out, or use"
            " an earlier torch."
        )
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about torch.ao moving to another package, and about its observers
            return _converted(copy.deepcopy(model), batches)
    except Exception as error:
        raise RepairError(
            f"The model could not be quantized by torch.ao ({root_cause(error)}). Export it without --quantize."
        ) from error


def _converted(model: nn.Module, batches: Sequence[Arguments]) -> nn.Module:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    mapping = get_default_qconfig_mapping(torch.backends.quantized.engine)
    prepared = prepare_fx(model, mapping, batches[0])
    for arguments in batches:
        prepared(*arguments)
    converted: nn.Module = convert_fx(prepared)
    return converted

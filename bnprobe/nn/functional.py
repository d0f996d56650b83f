"""Batch Renormalization as a function, the counterpart of ``torch.nn.functional.batch_norm``.

Both functions can be intercepted by a ``TorchFunctionMode`` just as PyTorch's own; the layers call nothing else.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from bnprobe.nn.kernels import Renorm, renormalize
from bnprobe.nn.sync import processes, synchronized_renorm


def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.01,
    eps: float = 1e-5,
    r_max: float | Tensor = 3.0,
    d_max: float | Tensor = 5.0,
    clipped: Tensor | None = None,
) -> Tensor:
    """Normalize by the batch, corrected towards the running statistics within limits (Ioffe 2017, algorithm 1).

    In training, ``y = weight * (r * (x - mean_B) / s_B + d) + bias`` with biased batch statistics, s = sqrt(var + eps),
    r = s_B / s and d = (mean_B - mean) / s from the running statistics as they are before this call; r and d are
    clipped, and constants for the gradient. At inference it is ``F.batch_norm`` with the running statistics.

    Args:
        input: Shape (N, C, *space).
        running_mean, running_var: Shape (C,); updated in place in training, the variance by the unbiased one of the
            batch. A batch of one value per channel has none, and leaves ``running_var`` as it is.
        weight, bias: Shape (C,); None: 1 and 0.
        training: Normalize by the batch, and update the running statistics.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variances inside the root; positive in training.
        r_max: r is clipped to [1 / r_max, r_max]; a tensor of shape () will do.
        d_max: d is clipped to [-d_max, d_max].
        clipped: In training, int64 tensor of shape (3,) to which are added: channels whose r was clipped, channels
            whose d was, and channels.

    Returns:
        Shape, dtype and memory format of ``input``.

    Raises:
        ValueError: eps is not positive, in training.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return _overridden(
            batch_renorm, input, running_mean, running_var, weight, bias,
            training=training, momentum=momentum, eps=eps, r_max=r_max, d_max=d_max,
            **({} if clipped is None else {"clipped": clipped}),
        )  # fmt: skip
    if not training or input.numel() == 0:  # as in BN, an empty batch changes nothing
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    return renormalize(
        input, weight, bias, Renorm(running_mean, running_var, momentum, _positive(eps), r_max, d_max, clipped)
    )


def sync_batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.01,
    eps: float = 1e-5,
    r_max: float | Tensor = 3.0,
    d_max: float | Tensor = 5.0,
    clipped: Tensor | None = None,
    process_group: Any = None,
) -> Tensor:
    """``batch_renorm`` by the batch of all processes together; every process must call it, a batch may be empty.

    Args:
        process_group: Processes that share their statistics; None: all. Where there is one process, or none is
            connected, this is ``batch_renorm``.

    The other arguments are those of ``batch_renorm``.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return _overridden(
            sync_batch_renorm, input, running_mean, running_var, weight, bias,
            training=training, momentum=momentum, eps=eps, r_max=r_max, d_max=d_max, process_group=process_group,
            **({} if clipped is None else {"clipped": clipped}),
        )  # fmt: skip
    if not training or processes(process_group) == 1:
        return batch_renorm(
            input, running_mean, running_var, weight, bias, training, momentum, eps, r_max, d_max, clipped
        )
    renorm = Renorm(running_mean, running_var, momentum, _positive(eps), r_max, d_max, clipped)
    return synchronized_renorm(input, weight, bias, renorm, process_group)


def _overridden(function: Any, *tensors: Tensor | None, **kwargs: Any) -> Tensor:
    output: Tensor = handle_torch_function(function, tensors, *tensors, **kwargs)
    return output


def _positive(eps: float) -> float:
    if eps <= 0:
        raise ValueError(f"batch_renorm needs a positive eps in training, but got {eps}.")
    return eps

"""Batch Renormalization as functions, like ``torch.nn.functional.batch_norm``.

The layers call only these. A ``TorchFunctionMode`` can intercept them, as it can PyTorch's own functions.
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from bnprobe.errors import UsageError
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
    *,
    r_min: float | Tensor | None = None,
    mask: Tensor | None = None,
    running: Literal["variance", "std"] = "variance",
    track: bool = True,
    renorm_mean: Tensor | None = None,
    renorm_var: Tensor | None = None,
    renorm_momentum: float | None = None,
) -> Tensor:
    """Normalize with the batch statistics, corrected towards the running statistics (Ioffe 2017, algorithm 1).

    In training, with the biased batch variance, the running statistics before this call, and s = sqrt(var + eps):

        y = weight * (r * (x - mean_batch) / s_batch + d) + bias
        r = s_batch / s_running                              clipped to [r_min, r_max]
        d = (mean_batch - mean_running) / s_running          clipped to [-d_max, d_max]

    r and d are constants for the gradient. At inference this is ``F.batch_norm`` with the running statistics.

    Args:
        input: Shape (N, C, *space).
        running_mean, running_var: Shape (C,). In training they are updated in place, the variance with the unbiased
            variance of the batch; with one value per channel there is none, and ``running_var`` stays as it is.
        weight, bias: Shape (C,); None stands for 1 and 0.
        training: Normalize with the batch statistics, and update the running statistics.
        momentum: Weight of the batch in the running statistics.
        eps: Added to the variances before the square root; must be positive in training.
        r_max, d_max: Limits of r and d; numbers, or tensors of shape ().
        clipped: An int64 tensor of shape (3,). In training, the numbers of channels with clipped r, of channels with
            clipped d, and of all channels are added to it.
        r_min: Lower limit of r, like these; None: 1 / r_max.
        mask: Shape (N, *space); True where a value counts in the batch statistics, and the input is 0 elsewhere. None:
            everywhere.
        running: "variance": the running variance is an average of variances, as in BN. "std": it is the square of an
            average of s, less eps, as in the paper.
        track: Whether the running statistics are updated in training.
        renorm_mean, renorm_var: Shape (C,). If given, r and d refer to these, which are updated with
            ``renorm_momentum``.
        renorm_momentum: Needed with these.

    Returns:
        The normalized input, with its shape, dtype and memory format.

    Raises:
        ValueError: eps is not positive in training.
    """
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return _overridden(
            batch_renorm, (input, running_mean, running_var, weight, bias),
            training=training, momentum=momentum, eps=eps, r_max=r_max, d_max=d_max,
            **_given(clipped=clipped, r_min=r_min, mask=mask, running=running, track=track, renorm_mean=renorm_mean,
                     renorm_var=renorm_var, renorm_momentum=renorm_momentum),
        )  # fmt: skip
    if not training or input.numel() == 0:  # as in BN, an empty batch changes nothing
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps)
    renorm = Renorm(
        running_mean, running_var, momentum, _positive(eps), r_min, r_max, d_max, clipped, running == "std", track,
        renorm_mean, renorm_var, renorm_momentum,
    )  # fmt: skip
    return renormalize(input, weight, bias, renorm, mask)


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
    *,
    r_min: float | Tensor | None = None,
    mask: Tensor | None = None,
    running: Literal["variance", "std"] = "variance",
    track: bool = True,
    renorm_mean: Tensor | None = None,
    renorm_var: Tensor | None = None,
    renorm_momentum: float | None = None,
) -> Tensor:
    """``batch_renorm`` with batch statistics over all processes.

    In training every process must call it; its batch may be empty. In a single process this is ``batch_renorm``.

    Args:
        process_group: Processes that share their statistics; None: all.

    The other arguments, the result and the errors are those of ``batch_renorm``.

    Raises:
        UsageError: There is a mask, in several processes.
    """
    given = _given(
        clipped=clipped, r_min=r_min, mask=mask, running=running, track=track, renorm_mean=renorm_mean,
        renorm_var=renorm_var, renorm_momentum=renorm_momentum,
    )  # fmt: skip
    if has_torch_function_variadic(input, running_mean, running_var, weight, bias):
        return _overridden(
            sync_batch_renorm, (input, running_mean, running_var, weight, bias),
            training=training, momentum=momentum, eps=eps, r_max=r_max, d_max=d_max, process_group=process_group,
            **given,
        )  # fmt: skip
    if not training or processes(process_group) == 1:
        return batch_renorm(
            input, running_mean, running_var, weight, bias, training, momentum, eps, r_max, d_max, **given
        )
    if mask is not None:
        raise UsageError("Batch Renorm over several processes takes no mask: use BatchRenorm1d, 2d or 3d for it.")
    renorm = Renorm(
        running_mean, running_var, momentum, _positive(eps), r_min, r_max, d_max, clipped, running == "std", track,
        renorm_mean, renorm_var, renorm_momentum,
    )  # fmt: skip
    return synchronized_renorm(input, weight, bias, renorm, process_group)


def _given(**settings: Any) -> dict[str, Any]:
    """The settings that are not the default, so that who intercepts a call sees only these."""
    defaults = {"running": "variance", "track": True}
    return {
        name: value
        for name, value in settings.items()
        if value is not None and (name not in defaults or value != defaults[name])
    }


def _overridden(function: Any, tensors: tuple[Tensor | None, ...], **kwargs: Any) -> Tensor:
    output: Tensor = handle_torch_function(function, tensors, *tensors, **kwargs)
    return output


def _positive(eps: float) -> float:
    if eps <= 0:
        raise ValueError(f"batch_renorm needs a positive eps in training, but got {eps}.")
    return eps

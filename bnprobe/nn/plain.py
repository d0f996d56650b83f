"""The layers' arithmetic in plain operations (internal).

Every function here is TorchScript: arguments have one type, and nothing is called that a script cannot hold. The same
code therefore serves scripts, ``torch.compile``, ``torch.func``, forward-mode AD and graph capture, which all look into
what a layer does. Python callers may give a tensor of shape () where a number is expected.
"""

from __future__ import annotations

import torch
from torch import Tensor


def batch_axes(dimensions: int) -> list[int]:
    """All axes but the channels, of an input of shape (N, C, *space)."""
    return [0] + [axis for axis in range(2, dimensions)]  # noqa: C416 (TorchScript knows no other way)


def widened(input: Tensor) -> Tensor:
    """The input in at least float32: half precision is too coarse for statistics."""
    return input.float() if input.dtype == torch.float16 or input.dtype == torch.bfloat16 else input


def parts_of(rows: int, most: int) -> int:
    """The fewest equal parts of at most ``most`` rows into which rows can be divided; at least 1."""
    return max(1, (rows + most - 1) // most)


def along_channels(values: Tensor, dimensions: int) -> Tensor:
    """Values of shape (channels,) or (samples, channels), made to broadcast with (N, C, *space)."""
    return values.reshape(list(values.shape) + [1] * (dimensions - 2))


def cut(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values with 0 where the mask is False.

    Args:
        values: Shape (N, C, *space).
        mask: Bool, shape (N, *space); None: True everywhere.

    Raises:
        ValueError: The mask has another shape or dtype.
    """
    if mask is None:
        return values
    wanted = list(values.shape[:1]) + list(values.shape[2:])
    if list(mask.shape) != wanted:
        raise ValueError(f"expected a mask of shape {wanted}, one value per position, but got {list(mask.shape)}")
    if mask.dtype != torch.bool:
        raise ValueError("expected a mask of dtype torch.bool, True where there is a value: give mask != 0")
    return torch.where(mask.unsqueeze(1), values, 0.0)


def masked_moments(x: Tensor, mask: Tensor, axes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of the values that a mask counts; both are 0 where there is none.

    Args:
        x: Shape (N, C, *space); 0 where the mask is False.
        mask: Shape (N, *space); True where a value counts.
        axes: Those of x that are reduced.

    Returns:
        Mean and variance of the shape that is left of x, and the count, with 1 in place of C.
    """
    counts = mask.unsqueeze(1) != 0
    number = counts.sum(axes).to(x.dtype)
    divisor = number.clamp(min=1.0)
    mean = x.sum(axes) / divisor
    shape = [1 if axis in axes else size for axis, size in enumerate(x.shape)]
    variance = torch.where(counts, x - mean.reshape(shape), 0.0).square().sum(axes) / divisor
    return mean, variance, number


def moments(x: Tensor, mask: Tensor | None, axes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values; arguments and result as for ``masked_moments``."""
    if len(axes) == 0:
        each = torch.ones_like(x) if mask is None else (mask != 0).unsqueeze(1).expand_as(x).to(x.dtype)
        return x, torch.zeros_like(x), each
    if mask is not None:
        return masked_moments(x, mask, axes)
    # With these arguments a compiler takes it for the one in BN, where there is one of the same x, and computes one.
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    number = 1
    for axis in axes:
        number *= x.shape[axis]
    return mean.squeeze(axes), variance.squeeze(axes), torch.full([1], number, dtype=x.dtype, device=x.device)


def pooled(mean: Tensor, variance: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of a batch from those of its samples (Chan et al. 1983).

    Args:
        mean, variance: Shape (samples, channels); the variance is biased.
        count: Values of each sample and channel; a shape that broadcasts.

    Returns:
        Mean and biased variance of shape (channels,), and the number of values.
    """
    counts = count.expand(mean.shape)
    number = counts.sum(0)
    divisor = number.clamp(min=1.0)
    total = (counts * mean).sum(0) / divisor
    return total, (counts * (variance + (mean - total).square())).sum(0) / divisor, number


def relative(mean: Tensor, deviation: Tensor, to_mean: Tensor, to_deviation: Tensor) -> tuple[Tensor, Tensor]:
    """The map z -> scale * z + shift from values normalized by one mean and deviation to those by another.

    From batch to running statistics, these are the r and d of Batch Renorm, not clipped.
    """
    return deviation / to_deviation, (mean - to_mean) / to_deviation


def towards_running(
    mean: Tensor, variance: Tensor, running_mean: Tensor, running_var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``relative`` from a batch (or sample) to the running statistics, which are constants: (scale, shift)."""
    target = (widened(current(running_var)) + eps).sqrt()
    return relative(mean, (variance + eps).sqrt(), widened(current(running_mean)), target)


def current(buffer: Tensor) -> Tensor:
    """The values of a buffer before it is updated, without gradient."""
    if torch.jit.is_scripting():
        return buffer.detach()
    else:  # noqa: RET505 (a script leaves this branch out)
        return snapshot(buffer)


def constants(r: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """A ``snapshot`` of r and d, which depend on the running statistics."""
    if torch.jit.is_scripting():
        return r, d
    else:  # noqa: RET505 (a script leaves this branch out)
        if not torch.compiler.is_compiling():
            return r, d
        r, d = snapshot(torch.stack([r, d])).unbind()
        return r, d


def snapshot(tensor: Tensor) -> Tensor:
    """The current values without gradient; copied only under ``torch.compile``.

    The compiler may recompute a value in the backward pass instead of saving it, even if the value was read from a
    buffer that the forward pass has updated since. The gradients are then silently wrong (seen with PyTorch 2.13; its
    pull request 197039 describes the problem). A custom operator is never recomputed.
    """
    if torch.compiler.is_compiling():
        copied: Tensor = torch.ops.bnprobe.snapshot(tensor.detach())
        return copied
    return tensor.detach()


_OPERATORS = torch.library.Library("bnprobe", "FRAGMENT")
_OPERATORS.define("snapshot(Tensor tensor) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_OPERATORS.impl("snapshot", Tensor.clone, "CompositeExplicitAutograd")  # a third of what custom_op adds to a call


def corrected(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Compute weight * (scale * (x - mean) / sqrt(variance + eps) + shift) + bias.

    Args:
        x: Shape (samples, channels, *space).
        mean, variance, scale, shift: Shape (channels,) or (samples, channels); the variance is biased.
        eps: Added to the variance before the square root.
        weight, bias: Shape (channels,); None stands for 1 and 0.
    """
    scale, shift = folded(scale * (variance + eps).rsqrt(), shift, weight, bias)
    # Centre first: folding the mean into the shift would lose digits where the mean is large against the deviation.
    centred = x - along_channels(mean, x.dim())
    return torch.addcmul(along_channels(shift, x.dim()), centred, along_channels(scale, x.dim()))


def folded(scale: Tensor, shift: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The map z -> scale * z + shift followed by a layer's weight and bias, as one map."""
    if weight is not None and bias is not None:
        return weight * scale, torch.addcmul(bias, weight, shift)
    if weight is not None:
        return weight * scale, weight * shift
    return scale, shift if bias is None else shift + bias


def normalize_running(
    input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalize as BN does at inference. (Not ``F.batch_norm``: a scan intercepts that to measure BN.)"""
    cudnn = torch.backends.cudnn.enabled
    return torch.batch_norm(input, weight, bias, running_mean, running_var, False, 0.0, eps, cudnn)


def normalize_by_batch(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalize as BN does in training, without running statistics.

    For the backward pass the input is kept and no copy of it, where ``moments`` and ``corrected`` keep one.
    """
    return torch.batch_norm(input, weight, bias, None, None, True, 0.0, eps, torch.backends.cudnn.enabled)


def unbiased(variance: Tensor, count: Tensor, otherwise: Tensor) -> Tensor:
    """The variance with Bessel's correction; ``otherwise`` where there is at most one value."""
    corrected = variance * (count / (count - 1).clamp(min=1)).to(variance.dtype)
    return torch.where(count > 1, corrected, otherwise.to(variance.dtype))


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, variance: Tensor, rate: float, of_std: bool, eps: float
) -> None:
    """Move the running statistics towards those of a batch, in place.

    Args:
        running_mean, running_var: Shape (channels,).
        mean: Of the batch, same shape.
        variance: Of the batch, as it is to be averaged: unbiased in BN.
        rate: Weight of the batch.
        of_std: Average sqrt(variance + eps) instead of the variance (Ioffe 2017, algorithm 1), and keep its square
            less eps in ``running_var``.
        eps: Of the layer.
    """
    dtype = running_mean.dtype
    # Not lerp_, which vmap does not know.
    running_mean.copy_(torch.lerp(running_mean, mean.detach().to(dtype), rate))
    new = variance.detach()
    if of_std:
        old = (running_var.to(new.dtype) + eps).sqrt()
        moved = old + ((new + eps).sqrt() - old) * rate
        running_var.copy_((moved.square() - eps).clamp(min=0.0))
    else:
        running_var.copy_(torch.lerp(running_var, new.to(running_var.dtype), rate))


def update_from(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    variance: Tensor,
    count: Tensor,
    rate: float,
    of_std: bool,
    eps: float,
) -> None:
    """``update_running`` from biased moments. One value has no variance: then only the running mean moves.

    Args:
        count: Number of values, shape () or (1,). With none, nothing moves.

    The other arguments are those of ``update_running``.
    """
    new = torch.where(count > 1, variance, running_var.to(variance.dtype))
    if not of_std:
        new = unbiased(variance, count, running_var)
    update_running(running_mean, running_var, torch.where(count > 0, mean, running_mean), new, rate, of_std, eps)


def renormalize(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    renorm_mean: Tensor | None,
    renorm_var: Tensor | None,
    mask: Tensor | None,
    clipped: Tensor | None,
    rate: float,
    renorm_rate: float,
    eps: float,
    r_min: float,
    r_max: float,
    d_max: float,
    of_std: bool,
    track: bool,
) -> Tensor:
    """``bnprobe.nn.functional.batch_renorm`` in training, in one process; the arguments are explained there."""
    x = widened(input)
    mean, variance, count = moments(x, mask, batch_axes(x.dim()))
    to_mean, to_var = running_mean, running_var
    if renorm_mean is not None and renorm_var is not None:
        to_mean, to_var = renorm_mean, renorm_var
    deviation, to_deviation = (variance.detach() + eps).sqrt(), (widened(to_var.detach()) + eps).sqrt()
    exact_r, exact_d = relative(mean.detach(), deviation, widened(to_mean.detach()), to_deviation)
    r, d = torch.clamp(exact_r, r_min, r_max), torch.clamp(exact_d, -d_max, d_max)
    if clipped is not None:
        clipped.add_(clipped_channels(exact_r, exact_d, r, d))
    r, d = constants(r, d)
    if mask is None:
        scale, shift = folded(r, d, weight, bias)
        output = normalize_by_batch(x, scale, shift, eps)
    else:
        output = corrected(x, mean, variance, eps, r, d, weight, bias)
    if track:
        update_from(running_mean, running_var, mean, variance, count, rate, of_std, eps)
        if renorm_mean is not None and renorm_var is not None:
            update_from(renorm_mean, renorm_var, mean, variance, count, renorm_rate, of_std, eps)
    return output.to(input.dtype)


def clipped_channels(exact_r: Tensor, exact_d: Tensor, r: Tensor, d: Tensor) -> Tensor:
    """The numbers of channels with clipped r and with clipped d, and of all channels; NaN counts as clipped."""
    clipped_r = (exact_r != r).sum()
    return torch.stack([clipped_r, (exact_d != d).sum(), torch.full_like(clipped_r, r.numel())])

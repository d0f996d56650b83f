"""Example weighing: BN in training; at inference every sample's own moments enter the running ones with a weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnprobe.nn.blended import BlendedBatchNorm
from bnprobe.nn.plain import batch_axes, corrected, moments, towards_running, update_from, widened


class ExampleWeighedBatchNorm(BlendedBatchNorm):
    """Base class of the example-weighed layers (Summers & Dinneen 2020, arXiv 1906.03548, section 3.1).

    In training it is BN. There every sample is a part of the statistics that normalize it, 1/n of a batch of n; at
    inference with running statistics it is none. So at inference the moments of the sample enter with a weight: per
    channel, with the mean m_i and the biased variance v_i of sample i over its positions, and the running mean m and
    variance v,

        mean_i = blend * m_i + (1 - blend) * m
        E[x^2]_i = blend * E_i[x^2] + (1 - blend) * E[x^2]
        var_i = E[x^2]_i - mean_i^2 = blend * v_i + (1 - blend) * v + blend * (1 - blend) * (m_i - m)^2

    The last form is computed, since nothing cancels in it. ``blend`` 0 is BN, and 1 is instance norm at inference. It
    needs no training: one ``blend`` for all layers is chosen on held-out data (alpha in the paper).

    A sample with one position, or of which a mask leaves one value or none, has no variance of its own: then the
    running statistics normalize alone.

    The keys of the state_dict are those of ``nn.BatchNorm``. ``blend`` is a setting, like eps, and not among them:
    plain BN with the same weights gives the same output only for ``blend`` 0. The input has at least 2 dimensions.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root; must be positive in training.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Whether there is a weight and a bias per channel.
        blend: Weight of the sample's own moments at inference, in [0, 1]; may be set later.
        device, dtype: Of parameters and buffers.
        bias: Whether an affine layer has a bias.

    Raises:
        UsageError: ``blend`` is out of range.
    """

    def _normalize(self, input: Tensor, mask: Tensor | None) -> Tensor:
        return self._scripted(input, mask)

    def _scripted(self, input: Tensor, mask: Tensor | None) -> Tensor:
        if self.training:
            return self._in_training(input, mask)
        if self.blend == 0.0 or input.numel() <= input.shape[0] * input.shape[1]:  # at most one position
            return self._at_inference(input)
        x = widened(input)
        mean, variance, count = moments(x, mask, batch_axes(x.dim())[1:])
        running_mean, running_var = self._statistics()
        blend = self.blend * (count > 1).to(x.dtype)
        difference = mean - running_mean.to(x.dtype)
        mean = running_mean.to(x.dtype) + blend * difference
        between = blend * (1 - blend) * difference.square()
        variance = blend * variance + (1 - blend) * running_var.to(x.dtype) + between
        shift = torch.zeros_like(mean)
        output = corrected(x, mean, variance, self._eps, torch.ones_like(mean), shift, self.weight, self.bias)
        return output.to(input.dtype)

    def _in_training(self, input: Tensor, mask: Tensor | None) -> Tensor:
        """BN."""
        if input.numel() == input.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.shape}")
        rate = self._count_batch()
        running_mean, running_var = self._statistics()
        if mask is None:
            tracked = self.track_running_stats
            cudnn = torch.backends.cudnn.enabled
            # Not F.batch_norm: a scan intercepts that to measure BN.
            return torch.batch_norm(
                input,
                self.weight,
                self.bias,
                running_mean if tracked else None,
                running_var if tracked else None,
                True,
                float(rate),
                self._eps,
                cudnn,
            )
        x = widened(input)
        mean, variance, count = moments(x, mask, batch_axes(x.dim()))
        r, d = towards_running(mean, variance, running_mean, running_var, self._eps)
        alone = count <= 1  # the mask leaves no variance: the running statistics normalize
        scale, shift = torch.where(alone, r, 1.0), torch.where(alone, d, 0.0)
        output = corrected(x, mean, variance, self._eps, scale, shift, self.weight, self.bias)
        if self.track_running_stats:
            update_from(running_mean, running_var, mean, variance, count, rate, False, 0.0)
        return output.to(input.dtype)


class ExampleWeighedBatchNorm1d(nn.BatchNorm1d, ExampleWeighedBatchNorm):
    """Example weighing for (N, C, L), and BN for (N, C); arguments as for ``ExampleWeighedBatchNorm``."""


class ExampleWeighedBatchNorm2d(nn.BatchNorm2d, ExampleWeighedBatchNorm):
    """Example weighing for (N, C, H, W); arguments as for ``ExampleWeighedBatchNorm``."""


class ExampleWeighedBatchNorm3d(nn.BatchNorm3d, ExampleWeighedBatchNorm):
    """Example weighing for (N, C, D, H, W); arguments as for ``ExampleWeighedBatchNorm``."""

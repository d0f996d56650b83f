"""BN with statistics of its own for every domain, where weight and bias are shared."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from bnprobe.errors import UsageError
from bnprobe.nn.base import BatchNormLike, takes_numbers
from bnprobe.nn.plain import (
    batch_axes,
    corrected,
    moments,
    normalize_by_batch,
    normalize_running,
    pooled,
    towards_running,
    update_from,
    widened,
)


class _Given(NamedTuple):
    """The domain of what runs: one for all, or one for each sample, shape (samples,), int64; and the largest."""

    domain: int | Tensor
    largest: int


class _Everywhere:
    """The domain that was given last, which a compiler can guard."""

    given: _Given | None = None


class _InThread(threading.local):
    """The domain that was given in this thread, which a compiler would take for a constant."""

    given: _Given | None = None


_everywhere, _in_thread = _Everywhere(), _InThread()


@contextmanager
def domain(index: int | Tensor) -> Iterator[None]:
    """Say of which domain the data is that runs inside the block; ``DomainBatchNorm`` layers use its statistics.

    Other layers do not notice. Blocks may be nested: the innermost counts, in its thread. What
    ``torch.utils.checkpoint`` runs again during the backward pass needs the block inside the checkpointed function.

    Args:
        index: The domain, from 0; or an integer tensor of shape (samples,) with the domain of every sample of a mixed
            batch. (A tensor on a GPU is waited for, once.)

    Raises:
        UsageError: The index is negative, or not of integers.

    Example:
        def loss(model, batch):
            images, labels, camera = batch
            with bnprobe.nn.domain(camera):
                return cross_entropy(model(images), labels)
    """
    before = _in_thread.given, _everywhere.given
    _in_thread.given = _everywhere.given = _checked(index)
    try:
        yield
    finally:
        _in_thread.given, _everywhere.given = before


def current_domain() -> int | Tensor | None:
    """The domain that was given here; None where none was."""
    return None if _in_thread.given is None else _in_thread.given.domain


def _checked(index: int | Tensor) -> _Given:
    if isinstance(index, Tensor):
        if index.dim() > 1 or index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise UsageError(
                "A domain is a whole number, or a tensor of whole numbers of shape (samples,), but got"
                f" {index.dtype} of shape {tuple(index.shape)}."
            )
        if index.dim() == 1:
            lowest, largest = (int(end) for end in index.aminmax()) if len(index) else (0, 0)
            _require_natural(lowest)
            return _Given(index.long(), largest)
        index = int(index)
    _require_natural(index)
    return _Given(int(index), int(index))


def _require_natural(index: int) -> None:
    if index < 0:
        raise UsageError(f"Domains are counted from 0, but got {index}.")


class DomainBatchNorm(BatchNormLike):
    """Base class of the layers with statistics per domain (Chang et al. 2019, arXiv 1906.03950, section 3).

    In training the samples of each domain are normalized with the mean and biased variance of that domain's part of the
    batch, at inference with its running statistics. Unlike the layers of the paper, weight and bias are shared. Which
    domain it is is said around the forward, for a whole call or for every sample of a mixed batch:

        with bnprobe.nn.domain(0):
            real = discriminator(images)
        with bnprobe.nn.domain(1):
            fake = discriminator(generated)

    A domain of which a batch has one value per channel has no variance: then its running statistics normalize.

    The statistics of the domains are the buffers ``domain_mean``, ``domain_var`` and ``domain_batches``, which
    ``nn.BatchNorm`` does not have; beside them ``running_mean`` and ``running_var`` move as in BN, whatever the domain,
    and nothing uses them but ``bnprobe.convert``. Plain BN can have one domain:
    ``bnprobe.deployable_state(model, original, domain=0)``. The input has at least 2 dimensions.

    Args:
        num_features: Number of channels.
        eps: Added to the variance before the square root; must be positive in training.
        momentum: Weight of the new batch in the running statistics; None: cumulative average.
        affine: Whether there is a weight and a bias per channel.
        domains: Number of domains.
        device, dtype: Of parameters and buffers.
        bias: Whether an affine layer has a bias.
        default_domain: The domain where none is given, as for TorchScript, which does not know ``domain``; None: that
            is an error. May be set later.

    Attributes:
        domain_mean, domain_var: Shape (domains, channels), the variance unbiased.
        domain_batches: Updates of each domain, int64, shape (domains,).

    Raises:
        UsageError: ``domains`` is below 1. In the forward: no domain is given, or one that the layer does not have.
        ValueError: (forward) There is not one domain for each sample of the input.
    """

    training_only: ClassVar[tuple[str, ...]] = ("domain_mean", "domain_var", "domain_batches")
    """Tensors of the state_dict that plain BN does not have."""

    __jit_unused_properties__: ClassVar[list[str]] = [*BatchNormLike.__jit_unused_properties__, "deployment_obstacle"]

    @takes_numbers
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        domains: int = 2,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        default_domain: int | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, device, dtype, bias=bias)
        if domains < 1:
            raise UsageError(f"domains is {domains}, but must be at least 1.")
        self.domains = domains
        self.default_domain = default_domain
        self.register_buffer("domain_mean", torch.zeros(domains, num_features, device=device, dtype=dtype))
        self.register_buffer("domain_var", torch.ones(domains, num_features, device=device, dtype=dtype))
        self.register_buffer("domain_batches", torch.zeros(domains, dtype=torch.long, device=device))
        self.domain_mean: Tensor
        self.domain_var: Tensor
        self.domain_batches: Tensor

    @property
    def deployment_obstacle(self) -> str:
        """Why plain BN with the same weights gives another output at inference, a clause."""
        return f"keeps statistics for each of {self.domains} domains, and BN has those of one"

    def statistics_of(self, domain: int) -> tuple[Tensor, Tensor, Tensor]:
        """Running mean, running variance and number of updates of a domain.

        Raises:
            UsageError: The layer has no such domain.
        """
        self._require_known(domain)
        return self.domain_mean[domain], self.domain_var[domain], self.domain_batches[domain]

    def samples_of(self, domain: int, input: Tensor) -> int:
        """The number of samples of a domain in a batch.

        Raises:
            UsageError: Nothing says of which domain the batch is.
        """
        index = self._index(input)
        return int((index == domain).sum()) if isinstance(index, Tensor) else len(input) * (index == domain)

    def share(self) -> None:
        """Begin every domain with the running statistics of all."""
        mean, variance = self._statistics()
        self.domain_mean.copy_(mean.expand_as(self.domain_mean))
        self.domain_var.copy_(variance.expand_as(self.domain_var))

    def moments_by_domain(self, input: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of the values of each domain in a batch, in float64.

        Args:
            input, mask: As in the forward.

        Returns:
            Mean and variance, shape (domains, channels), 0 without a value; and the number, shape (domains, 1).

        Raises:
            UsageError: No domain is given, or one that the layer does not have.
        """
        index = self._index(input)
        if isinstance(index, int):
            index = torch.full(input.shape[:1], index, device=input.device)
        x = input.double()
        if mask is not None:
            x = torch.where(mask.unsqueeze(1) != 0, x, 0.0)
        return _pooled_by_domain(*moments(x, mask, batch_axes(x.dim())[1:]), self._members(index))

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if "domain_mean" in self._buffers:  # not yet while the layer is made
            self.domain_mean.zero_()
            self.domain_var.fill_(1)
            self.domain_batches.zero_()

    def extra_repr(self) -> str:
        own = f"{super().extra_repr()}, domains={self.domains}"
        return own if self.default_domain is None else f"{own}, default_domain={self.default_domain}"

    def _normalize(self, input: Tensor, mask: Tensor | None) -> Tensor:
        index = self._index(input)
        return self._of_one(input, index, mask) if isinstance(index, int) else self._of_many(input, index, mask)

    def _index(self, input: Tensor) -> int | Tensor:
        """The domain of the samples, or of each of them, shape (samples,)."""
        given = _everywhere.given if torch.compiler.is_compiling() else _in_thread.given
        if given is None:
            if self.default_domain is None:
                raise UsageError(
                    f"{type(self).__name__} keeps statistics for each of {self.domains} domains, but nothing says which"
                    " one this data is of: call the model inside `with bnprobe.nn.domain(index):`."
                )
            given = _Given(self.default_domain, self.default_domain)
        self._require_known(given.largest)
        index = given.domain
        if isinstance(index, int):
            return index
        if len(index) != input.shape[0]:
            raise ValueError(f"expected a domain for each of {input.shape[0]} samples, but got {len(index)} domains")
        return index.to(input.device)

    def _members(self, index: Tensor) -> Tensor:
        """Whether a sample is of a domain, shape (samples, domains)."""
        return index.unsqueeze(1) == torch.arange(self.domains, device=index.device)

    def _scripted(self, input: Tensor, mask: Tensor | None) -> Tensor:
        index = self.default_domain
        if index is None:
            raise ValueError("a script keeps no domain: set default_domain before scripting")
        else:  # noqa: RET506 (a script leaves this branch out)
            return self._of_one(input, index, mask)

    def _of_one(self, input: Tensor, index: int, mask: Tensor | None) -> Tensor:
        """Normalize samples that are all of one domain."""
        domain_mean, domain_var = self.domain_mean[index : index + 1], self.domain_var[index : index + 1]
        rate = self._count_batch() if self.training else 0.0
        if not self.training or input.numel() == 0:
            return normalize_running(input, domain_mean[0], domain_var[0], self.weight, self.bias, self._eps)
        x = widened(input)
        is_bn = mask is None and input.numel() > input.shape[1]
        mean, variance, count = moments(x.detach() if is_bn else x, mask, batch_axes(x.dim()))
        mean, variance, count = mean.unsqueeze(0), variance.unsqueeze(0), count.reshape(1, 1)
        if is_bn:  # BN's own kernel keeps less for the backward pass
            output = normalize_by_batch(input, self.weight, self.bias, self._eps)
        else:
            output = self._by_domain(x, mean, variance, count, domain_mean, domain_var, None)
        if self.track_running_stats:
            self._track(mean, variance, count, rate, domain_mean, domain_var, self.domain_batches[index : index + 1])
        return output.to(input.dtype)

    def _of_many(self, input: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
        """Normalize samples of several domains, each with the statistics of its own."""
        rate = self._count_batch() if self.training else 0.0
        x = widened(input)
        if not self.training or input.numel() == 0:
            mean, variance = widened(self.domain_mean)[index], widened(self.domain_var)[index]
            one = torch.ones_like(mean)
            output = corrected(x, mean, variance, self._eps, one, torch.zeros_like(one), self.weight, self.bias)
            return output.to(input.dtype)
        mean, variance, count = moments(x, mask, batch_axes(x.dim())[1:])
        mean, variance, count = _pooled_by_domain(mean, variance, count, self._members(index))
        output = self._by_domain(x, mean, variance, count, self.domain_mean, self.domain_var, index)
        if self.track_running_stats:
            self._track(mean, variance, count, rate, self.domain_mean, self.domain_var, self.domain_batches)
        return output.to(input.dtype)

    def _by_domain(
        self,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        domain_mean: Tensor,
        domain_var: Tensor,
        index: Tensor | None,
    ) -> Tensor:
        """Normalize with the moments of each domain, shape (domains, channels); those of one serve all samples."""
        r, d = towards_running(mean, variance, domain_mean, domain_var, self._eps)
        enough = count > 1  # else there is no variance, and the running statistics normalize
        scale, shift = torch.where(enough, torch.ones_like(r), r), torch.where(enough, torch.zeros_like(d), d)
        if index is not None:
            mean, variance, scale, shift = mean[index], variance[index], scale[index], shift[index]
        return corrected(x, mean, variance, self._eps, scale, shift, self.weight, self.bias)

    def _track(
        self,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        rate: float,
        domain_mean: Tensor,
        domain_var: Tensor,
        batches: Tensor,
    ) -> None:
        """Move the running statistics of the domains in a batch, and those of all together."""
        batches.add_((count.squeeze(1) > 0).to(batches.dtype))
        own = rate
        if self.momentum is None:
            if torch.jit.is_scripting():
                own = 1.0 / max(float(batches[0]), 1.0)
            else:
                own = cast(float, batches.clamp(min=1).to(domain_mean.dtype).reciprocal().unsqueeze(1))
        update_from(domain_mean, domain_var, mean, variance, count, own, False, 0.0)
        running_mean, running_var = self._statistics()
        mean, variance, count = pooled(mean, variance, count)
        update_from(running_mean, running_var, mean, variance, count, rate, False, 0.0)

    def _require_known(self, domain: int) -> None:
        if not 0 <= domain < self.domains:
            raise UsageError(
                f"{type(self).__name__} has {self.domains} domains, counted from 0, but was asked for {domain}: convert"
                " with more domains (repair.domains in the spec)."
            )


def _pooled_by_domain(mean: Tensor, variance: Tensor, count: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of each domain from those of its samples (Chan et al. 1983).

    Args:
        mean, variance: Shape (samples, channels); the variance is biased.
        count: Values of each sample; shape (samples, 1) or (samples, channels), or (1,) where all have as many.
        members: Shape (samples, domains).

    Returns:
        Mean and biased variance, shape (domains, channels), 0 where there is no sample; values, shape (domains, 1).
    """
    weights = (members * (count if count.dim() == 1 else count[:, :1])).to(mean.dtype).unsqueeze(2)
    number = weights.sum(0)
    divisor = number.clamp(min=1.0)
    total = (weights * mean.unsqueeze(1)).sum(0) / divisor
    spread = variance.unsqueeze(1) + (mean.unsqueeze(1) - total).square()
    return total, (weights * spread).sum(0) / divisor, number


class DomainBatchNorm1d(nn.BatchNorm1d, DomainBatchNorm):
    """BN per domain for (N, C) or (N, C, L); arguments as for ``DomainBatchNorm``."""


class DomainBatchNorm2d(nn.BatchNorm2d, DomainBatchNorm):
    """BN per domain for (N, C, H, W); arguments as for ``DomainBatchNorm``."""


class DomainBatchNorm3d(nn.BatchNorm3d, DomainBatchNorm):
    """BN per domain for (N, C, D, H, W); arguments as for ``DomainBatchNorm``."""

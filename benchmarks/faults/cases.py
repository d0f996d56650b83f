"""A model with the batches and options that it is scanned with: what faults are planted in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.faults.networks import NETWORKS, Loss, Network, forward, healthy, settle, train
from benchmarks.faults.samples import Batch, Samples, Sampling, changed, loader
from bnprobe import Report, scan


def unchanged(inputs: Tensor) -> Tensor:
    """Leave the inputs as they are."""
    return inputs


def whole(samples: Samples) -> Samples:
    """Leave the samples as they are."""
    return samples


@dataclass(frozen=True)
class Case:
    """Everything that a scan is given.

    Attributes:
        model: A copy of its own.
        network: What it was made from.
        seed: Of the network and of all that is drawn for the case.
        sampling: How its training batches are drawn.
        loss: Mean over the batch.
        crop: What is done to all samples, in training and at evaluation.
        shift: What is done to the held-out data alone; None: the case has no held-out data.
        alone: The model is judged without data, as ``bnprobe lint`` does.
        options: Further arguments of ``bnprobe.scan``.
    """

    model: nn.Module
    network: Network
    seed: int
    sampling: Sampling
    loss: Loss
    crop: Callable[[Samples], Samples] = whole
    shift: Callable[[Tensor], Tensor] | None = None
    alone: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def with_options(self, **options: Any) -> Case:
        """The same case, scanned with further options."""
        return replace(self, options={**self.options, **options})

    def drawn(self, **changes: Any) -> Case:
        """The same case with its batches drawn in another way."""
        return replace(self, sampling=replace(self.sampling, **changes))

    def trained(self, steps: int, rate: float = 1e-3, settling: int = 60) -> Case:
        """The same case after further training on its own batches."""
        torch.manual_seed(self.seed)
        train(self.model, self.loss, self.training(), self.sampling, steps, rate, settling)
        return self

    def settled(self, steps: int = 60) -> Case:
        """The same case after forward passes on its own batches, which move the running statistics alone."""
        torch.manual_seed(self.seed)
        settle(self.model, self.training(), self.sampling, steps)
        return self

    def batches(self, order: int = 1000) -> DataLoader[Batch]:
        """The training batches that a scan sees; ``order`` makes them other ones than in training."""
        return loader(self.training(), replace(self.sampling, seed=self.sampling.seed + order))

    def evaluation(self) -> DataLoader[Batch] | None:
        """The held-out batches, where the case has any."""
        if self.shift is None:
            return None
        return loader(self.held_out(), Sampling(self.sampling.batch_size, seed=self.seed))

    def scanned(self, num_batches: int | None = None, order: int = 1000) -> Report:
        """What bnprobe says of the case.

        Args:
            num_batches: Micro-batches; None: until every layer is decided, as a user has it.
            order: Of the batches: another number, other batches.
        """
        options = dict(self.options)
        evaluation = self.evaluation()
        if evaluation is not None:
            options["evaluation"] = evaluation
        return scan(
            self.model,
            self.batches(order),
            num_batches=num_batches,
            forward=forward,
            loss=self.loss,
            **options,
        )

    def held_out(self) -> Samples:
        """What the case is evaluated on."""
        return changed(self.crop(self.network.data().held_out), self.shift or unchanged)

    def training(self) -> Samples:
        """What the case is trained on."""
        return self.crop(self.network.data().training)


def healthy_case(name: str, seed: int) -> Case:
    """A healthy network, scanned as it was trained."""
    network = NETWORKS[name]
    return Case(healthy(name, seed), network, seed, Sampling(network.batch_size, seed=seed), network.loss)

"""A model with the batches and options that it is scanned with: what faults are planted in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from benchmarks.faults.networks import NETWORKS, Loss, Network, forward, healthy, settle, train
from benchmarks.faults.samples import Batch, Samples, Sampling, changed, loader
from bnprobe import Report, scan

Change = Callable[[Samples], Samples]


def whole(samples: Samples) -> Samples:
    """Leave the samples as they are."""
    return samples


def on_inputs(change: Callable[[Tensor], Tensor]) -> Change:
    """A change of the inputs alone."""
    return lambda samples: changed(samples, change)


@dataclass(frozen=True)
class Case:
    """Everything that a scan is given.

    Attributes:
        model: A copy of its own.
        network: What it was made from.
        seed: Of the network and of all that is drawn for the case.
        sampling: How its training batches are drawn.
        loss: Mean over the batch.
        prepared: What is done to the training data.
        evaluated: What is done to the held-out data.
        held_out_given: Whether the scan gets held-out data.
        served_in_training: The model is used in train mode: ``eval()`` is not called.
        served_batch: Samples in the batches that it is used on; None: no matter.
        twin: The same weights without the fault, where they were trained on under it and are not to blame. None: the
            healthy network that it was made from.
        alone: The model is judged without data, as ``bnprobe lint`` does.
        options: Further arguments of ``bnprobe.scan``.
    """

    model: nn.Module
    network: Network
    seed: int
    sampling: Sampling
    loss: Loss
    prepared: Change = whole
    evaluated: Change = whole
    held_out_given: bool = True
    served_in_training: bool = False
    served_batch: int | None = None
    twin: nn.Module | None = None
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

    def with_twin(self) -> Case:
        """The same case, beside its weights with statistics of their own."""
        twin = copy.deepcopy(self.model)
        for module in twin.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = None  # a cumulative average
                module.reset_running_stats()
        settle(twin, self.training(), self.sampling, 100)
        return replace(self, twin=twin)

    def batches(self, order: int = 1000) -> DataLoader[Batch]:
        """The training batches that a scan sees; ``order`` makes them other ones than in training."""
        return loader(self.training(), replace(self.sampling, seed=self.sampling.seed + order))

    def evaluation(self) -> DataLoader[Batch]:
        """The held-out batches that a scan sees."""
        return loader(self.held_out(), Sampling(self.sampling.batch_size, seed=self.seed, drop_last=False))

    def scanned(self, num_batches: int | None = None, order: int = 1000) -> Report:
        """What bnprobe says of the case.

        Args:
            num_batches: Micro-batches; None: until every layer is decided, as a user has it.
            order: Of the batches: another number, other batches.
        """
        options = dict(self.options)
        if self.held_out_given:
            options |= {"evaluation": self.evaluation()}
        return scan(
            self.model,
            self.batches(order),
            num_batches=num_batches,
            forward=forward,
            loss=self.loss,
            metric=self.network.metric,
            goal="max",
            **options,
        )

    def training(self) -> Samples:
        """What the case is trained on."""
        return self.prepared(self.network.data().training)

    def held_out(self) -> Samples:
        """Held-out data for the scan, and for remedies that use it."""
        return self.evaluated(self._half(0))

    def unseen(self) -> Samples:
        """Held-out data that no scan and no remedy sees: what the case is scored on."""
        return self.evaluated(self._half(1))

    def _half(self, part: int) -> Samples:
        samples = self.network.data().held_out
        return samples.take(torch.arange(part, len(samples), 2))


def healthy_case(name: str, seed: int) -> Case:
    """A healthy network, scanned as it was trained."""
    network = NETWORKS[name]
    return Case(healthy(name, seed), network, seed, Sampling(network.batch_size, seed=seed), network.loss)

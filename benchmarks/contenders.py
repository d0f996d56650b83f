"""The forward passes that are timed: plain, the loop a user would write, and bnprobe's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.setting import BATCH_SIZE
from bnprobe.commands.scan import scan
from bnprobe.measure.batch import join
from bnprobe.measure.forward_pass import Pass
from bnprobe.measure.layers import find_layers
from bnprobe.measure.path_evidence import PathEvidence
from bnprobe.measure.session import PathName, Session, UserFunctions
from bnprobe.measure.statistic import Scope
from bnprobe.records import Report


@torch.no_grad()
def plain(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """The eval-mode forward pass, and nothing else."""
    model.eval()
    for batch in batches:
        model(batch)


@torch.no_grad()
def hook_loop(model: nn.Module, batches: Sequence[Tensor], train: bool) -> list[list[tuple[Tensor, Tensor]]]:
    """The obvious script: real batches one by one, with a hook on every BN layer that computes mean and variance.

    In train mode PyTorch would also update the running statistics. Momentum 0 keeps them unchanged at no cost.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    found: list[list[tuple[Tensor, Tensor]]] = []

    def take(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[-1].append(_moments(inputs[0]))

    handles = [norm.register_forward_pre_hook(take) for norm in norms]
    model.train(train)
    for norm in norms:
        norm.momentum = 0.0
    for batch in batches:
        found.append([])
        model(batch)
    for norm, momentum, handle in zip(norms, momenta, handles, strict=True):
        norm.momentum = momentum
        handle.remove()
    model.eval()
    return found


class Probe:
    """bnprobe's measured passes over micro-batches of two, one path at a time.

    Args:
        model: A model in eval mode; it stays so.
        micro_batches: Micro-batches of ``BATCH_SIZE`` images, on the model's device.
        physical: Images per physical batch.
    """

    def __init__(self, model: nn.Module, micro_batches: Sequence[Tensor], physical: int) -> None:
        at_once = physical // BATCH_SIZE
        self._steps = [list(micro_batches[i : i + at_once]) for i in range(0, len(micro_batches), at_once)]
        self._model, self._layers = model, find_layers(model, lambda name: True)
        # One for all runs, as for both paths of a scan: calls that lost digits are known from the first one on.
        self._session = Session(model, self._layers, UserFunctions(), micro_batches[0].device)

    def run(self, path: PathName, batch_sizes: Sequence[int] = (BATCH_SIZE,)) -> list[PathEvidence]:
        """Forward passes, moments, normalization by micro-batch and accumulation, as a scan does them."""
        with self._installed() as session:
            scope: Scope = "eval" if path == "eval" else "train"
            sums = [PathEvidence(scope, batch_sizes[0]), *(PathEvidence("other sizes", n) for n in batch_sizes[1:])]
            for step in self._steps:
                pass_ = Pass(len(step) * BATCH_SIZE, BATCH_SIZE, per_sample=path == "eval")
                session.forward(path, join(step), pass_)
                for one in sums:
                    one.add(pass_.records, self._layers.layers)
            for one in sums:
                one.settle()
        return sums

    @contextmanager
    def _installed(self) -> Iterator[Session]:
        with self._session.installed():
            yield self._session
        self._model.eval()


def whole_scan(model: nn.Module, micro_batches: Sequence[Any], **options: Any) -> Report:
    """Run what ``bnprobe scan`` does after loading: both paths, including self-check and report."""
    device = str(next(model.parameters()).device)
    return scan(model, micro_batches, BATCH_SIZE, num_batches=len(micro_batches), device=device, **options)


@torch.no_grad()
def scored(model: nn.Module, micro_batches: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
    """Micro-batches with the classes that the model gives, and what makes ``whole_scan`` score them: options.

    The held-out data are as many images, mirrored.
    """
    data = [(batch, model(batch).argmax(1)) for batch in micro_batches]
    held_out = [(batch.flip(3), classes) for batch, classes in data]
    return data, {"evaluation": held_out, "forward": _forward, "loss": loss, "metric": _accuracy}


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross entropy, in nats, of inputs and classes."""
    return F.cross_entropy(model(batch[0]), batch[1])


def _accuracy(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float().mean()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)

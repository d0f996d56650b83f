"""How often training steps update the running statistics, beyond the forward passes that they are trained by."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnprobe.analysis.diagnosis import diagnose, judge
from bnprobe.config.spec import RulesSpec
from bnprobe.measure.batch import tensors_of
from bnprobe.measure.layers import ProbedLayer
from bnprobe.measure.norms import FunctionFamily, WholeModule
from bnprobe.monitor.sampling import Hook
from bnprobe.nn.frozen import FrozenBatchNorm
from bnprobe.records import Diagnosis, Layer, Updates
from bnprobe.rules.double_update import DoubleUpdate
from bnprobe.rules.facts import Facts


@dataclass(frozen=True)
class Counted:
    """The updates of one layer in a step.

    Attributes:
        updates: Calls in train mode.
        trained: Of these, the calls whose outputs took part in a loss: ``backward()`` came through them.
    """

    updates: int
    trained: int

    @property
    def extra(self) -> int:
        """Updates that no loss is of; 0 where none is, as in a copy that follows another network."""
        return self.updates - self.trained if self.trained else 0


class UpdateCount:
    """Counts, from ``start`` to ``stop``, the updates of running statistics.

    A call that runs again in the backward pass, as in a checkpoint, counts again, and only one of the two takes part in
    the loss. The calls of accumulated batches, of real and generated ones, and of both sides of a siamese network all
    take part.

    Args:
        pauses: Whether a call is the monitor's own.
    """

    def __init__(self, pauses: Callable[[], bool]) -> None:
        self._calls: dict[str, list[list[bool]]] = defaultdict(list)
        self._hooks = ExitStack()
        self._pauses = pauses

    def start(self, layers: Iterable[ProbedLayer]) -> None:
        """Hook these layers, and begin anew."""
        self._calls.clear()
        for layer in layers:
            # Functions say only at a call whether it trains, and layers that a monitor froze update nothing.
            known = not isinstance(layer.family, FunctionFamily | WholeModule)
            if known and layer.info.running_mean is not None and not isinstance(layer.module, FrozenBatchNorm):
                self._hooks.callback(layer.module.register_forward_hook(Hook(self._hook(layer.name))).remove)

    def stop(self) -> None:
        """Leave no hook on the layers."""
        self._hooks.close()

    def clear(self) -> None:
        """Forget what was counted: it belonged to the step of another model."""
        self._calls.clear()

    def found(self) -> dict[str, Counted]:
        """By the names of the layers that were called in train mode."""
        return {name: Counted(len(calls), sum(map(any, calls))) for name, calls in self._calls.items()}

    def _hook(self, name: str) -> Any:
        def called(module: nn.Module, args: Any, output: Any) -> None:
            if self._pauses() or torch.compiler.is_compiling() or not module.training:
                return
            trained: list[bool] = []
            self._calls[name].append(trained)
            for tensor in tensors_of(output):
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    tensor.grad_fn.register_prehook(lambda gradients: trained.append(True))

        return called


def diagnosed(counted: Sequence[Mapping[str, Counted]], layers: Iterable[Layer], facts: Facts) -> tuple[Diagnosis, ...]:
    """What the rule of a scan says of the updates that most of these steps had.

    Args:
        counted: Of some steps in a row.
        layers: As a scan measured them.
        facts: Of the model alone.
    """
    measured = {}
    for layer in layers:
        seen = [each[layer.name] for each in counted if layer.name in each]
        if len(seen) > len(counted) / 2 and statistics.median_low(each.extra for each in seen):
            per_step, trained = (
                statistics.median_low([getattr(each, what) for each in seen]) for what in ("updates", "trained")
            )
            # A rate is not measured: momentum says what the updates do.
            updates = Updates(float(per_step), rate=None, configured=None, drift=0.0)
            measured[layer.name] = replace(layer, updates=updates, calls_per_forward=trained)
    found = replace(facts, layers=measured)
    return diagnose(judge(found, RulesSpec(), [DoubleUpdate()]), found)

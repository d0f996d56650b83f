"""The seam between surgery and what a layer can become."""

from __future__ import annotations

from typing import Protocol

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnprobe.spec import RepairName, RepairSpec


class Repair(Protocol):
    """One kind of layer that can stand in for BN.

    A repair only answers for the normalization: what a subclass does beyond it, hooks, and the places where the layer
    stands are the surgery's business.
    """

    @property
    def name(self) -> RepairName:
        """As in ``--to``."""

    @property
    def deploys(self) -> bool:
        """Whether plain BN with the repaired weights gives the repaired layer's output at inference."""

    @property
    def agrees(self) -> bool:
        """Whether training and inference give the same output by construction."""

    def obstacle(self, module: _BatchNorm) -> str | None:
        """Why this layer cannot be converted so, a clause; None if it can."""

    def note(self, module: _BatchNorm) -> str:
        """What changes beyond the class, a clause; empty if nothing does."""

    def replacement(self, module: _BatchNorm, spec: RepairSpec) -> nn.Module:
        """The new layer, with the Parameter and buffer objects of ``module``, which is not changed."""

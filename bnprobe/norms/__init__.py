"""The norm families that bnprobe can probe, one file each."""

from __future__ import annotations

from bnprobe.norms.batch_norm import BatchNormFamily
from bnprobe.norms.batch_renorm import BatchRenormFamily
from bnprobe.norms.gated import GatedFamily
from bnprobe.norms.interface import NormCall, NormFamily, NormInfo

NORMS: tuple[NormFamily, ...] = (BatchRenormFamily(), GatedFamily(), BatchNormFamily())
"""Every family that can be probed; the first that matches a layer is its own. A new one is one file, one line here."""

__all__ = ["NORMS", "NormCall", "NormFamily", "NormInfo"]

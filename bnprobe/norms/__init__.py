"""The norm families that bnprobe can probe, one file each."""

from __future__ import annotations

from bnprobe.norms.batch_norm import BatchNormFamily
from bnprobe.norms.interface import NormCall, NormFamily, NormInfo

NORMS: tuple[NormFamily, ...] = (BatchNormFamily(),)
"""Every family that can be probed. A new family is one file and one line here."""

__all__ = ["NORMS", "NormCall", "NormFamily", "NormInfo"]

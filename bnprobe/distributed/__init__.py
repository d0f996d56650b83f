"""The processes of a torchrun launch: rank and size, each process's micro-batches, and exchange between processes."""

from __future__ import annotations

from bnprobe.distributed.launch import connected, launched
from bnprobe.distributed.share import EVERYTHING, OPENING, Share
from bnprobe.distributed.world import ALONE, World

__all__ = ["ALONE", "EVERYTHING", "OPENING", "Share", "World", "connected", "launched"]

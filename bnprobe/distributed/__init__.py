"""The processes of a torchrun launch: who this one is, which micro-batches are its own, and what all of them say."""

from __future__ import annotations

from bnprobe.distributed.launch import connected, launched
from bnprobe.distributed.share import EVERYTHING, OPENING, Share
from bnprobe.distributed.world import ALONE, World

__all__ = ["ALONE", "EVERYTHING", "OPENING", "Share", "World", "connected", "launched"]

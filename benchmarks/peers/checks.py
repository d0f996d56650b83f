"""All checks, registered by import."""

from __future__ import annotations

from benchmarks.peers import graphs, modules, others, several, training, transforms  # noqa: F401
from benchmarks.peers.registry import CHECKS

__all__ = ["CHECKS"]

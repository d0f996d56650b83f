"""All checks, by suite."""

from __future__ import annotations

from benchmarks.peers import graphs, modules, others, several, training, transforms
from benchmarks.peers.registry import checks_of

CHECKS = [check for suite in (modules, transforms, graphs, training, several, others) for check in checks_of(suite)]

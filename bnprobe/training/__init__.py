"""Fine-tune a model: steps, states to resume from, logs."""

from __future__ import annotations

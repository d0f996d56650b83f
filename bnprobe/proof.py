"""Train the arms, and hold the repaired model against its control."""

from __future__ import annotations

"""Compare two reports of one model."""

from __future__ import annotations

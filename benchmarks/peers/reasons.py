"""Why failures stand, by check, for the table."""

from __future__ import annotations

REASONS: dict[str, str] = {}

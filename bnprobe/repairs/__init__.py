"""What a layer can be converted to, and the surgery that does it."""

from __future__ import annotations

"""Take running statistics anew, from pooled population statistics."""

from __future__ import annotations

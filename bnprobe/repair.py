"""Repair a model and prove the gain: a table of contents."""

from __future__ import annotations

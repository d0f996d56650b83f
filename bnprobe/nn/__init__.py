"""Batch Renorm and its relatives, as layers that deploy as plain BN."""

from __future__ import annotations

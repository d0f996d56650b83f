"""Export a model, and compare what the export gives with the model."""

from __future__ import annotations

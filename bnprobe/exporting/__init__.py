"""Export a model to a file that other programs can run, and check that the file gives the model's outputs.

A new format is one file with an ``Exporter`` and one line in `EXPORTERS`.
"""

from __future__ import annotations

from bnprobe.exporting.export import Exported, export_spec
from bnprobe.exporting.exporters import EXPORTERS
from bnprobe.exporting.interface import Exporter

__all__ = ["EXPORTERS", "Exported", "Exporter", "export_spec"]

"""The result of a scan."""

from __future__ import annotations

from dataclasses import dataclass

from bnprobe.records.findings import Diagnosis, Remedy, Verdict
from bnprobe.records.layers import Layer, SkippedLayer
from bnprobe.records.scans import Environment, Scan, Summary, Tool


@dataclass(frozen=True)
class Report:
    """The result of a scan."""

    schema_version: int
    tool: Tool
    environment: Environment
    scan: Scan
    summary: Summary
    layers: tuple[Layer, ...]
    skipped: tuple[SkippedLayer, ...]
    verdicts: tuple[Verdict, ...] = ()
    diagnoses: tuple[Diagnosis, ...] = ()
    remedies: tuple[Remedy, ...] = ()

"""``--baseline`` and ``--write-baseline``: findings that are known, read before a command runs and written after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from bnprobe.errors import UsageError
from bnprobe.records import Baseline, LintReport, Report

if TYPE_CHECKING:
    from bnprobe.cli.delivery import Delivery

_Judged = TypeVar("_Judged", Report, LintReport)


class Baselines:
    """The known findings that a command compares with, and those that it writes.

    Args:
        known: The file of ``--baseline``.
        written: The file of ``--write-baseline``.

    Raises:
        UsageError: The first cannot be read, or is no baseline.
    """

    def __init__(self, known: Path | None, written: Path | None) -> None:
        self._path = known
        self._known: Baseline | None = None
        if known is not None:
            from bnprobe.report.json import read_as

            self._known = read_as(known, Baseline)
        self.written = [] if written is None else [written]

    @property
    def read(self) -> list[Path]:
        """The files that are read."""
        return [] if self._path is None else [self._path]

    def deliver(self, report: _Judged, narrowed: bool, delivery: Delivery | None) -> _Judged:
        """Compare a report with the baseline, deliver it, and write the new baseline.

        Findings that are written are known.

        Args:
            report: Of a scan or a lint.
            narrowed: Whether the user has selected among the rules.
            delivery: Where the report goes; None: nothing is written by this process.

        Returns:
            The report with its findings against those that are known.

        Raises:
            UsageError: The baseline is of something else, or the scan ended early; the report was delivered without it.
        """
        if self._known is None and not self.written:
            if delivery is not None:
                delivery.deliver(report)
            return report
        from bnprobe.analysis.baseline import baseline_of, compare
        from bnprobe.report.json import dump

        found = baseline_of(report, narrowed)
        path = self._path or self.written[0]
        try:
            changes = compare(self._known or found, report, str(path), narrowed)
        except UsageError:
            if delivery is not None:
                delivery.deliver(report)
            raise
        compared = replace(report, baseline=changes)
        if delivery is not None:
            delivery.deliver(compared, {path: dump(found) for path in self.written})
        return compared

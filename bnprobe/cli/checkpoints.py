"""Several checkpoints in one scan: which files are meant, and a scan of each with a comparison at the end."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bnprobe.errors import EXIT_CLEAN, EXIT_FINDINGS, BnprobeError, UsageError
from bnprobe.paths import exists

if TYPE_CHECKING:
    from bnprobe.config.spec import Spec
    from bnprobe.records import Report


def expanded(given: Sequence[str]) -> list[str]:
    """The paths that ``--checkpoint`` names, those of a pattern in the order of their numbers (epoch 2 before 10).

    Raises:
        UsageError: A pattern fits no file.
    """
    found: list[str] = []
    for text in given:
        is_pattern = glob.has_magic(text) and not exists(Path(text))
        matches = sorted(glob.glob(text), key=_in_words_and_numbers) if is_pattern else [text]  # noqa: PTH207, absolute too
        if not matches:
            raise UsageError(f"--checkpoint {text} fits no file.")
        found += matches
    return list(dict.fromkeys(found))


def _in_words_and_numbers(path: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", path)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


class Several:
    """A scan of each of several checkpoints, and their comparison.

    With a folder every scan has files of its own there, e.g. ``scan-epoch3.json``, and the comparison
    ``compare.json``. Without one, the comparison alone is written, or printed.

    Args:
        paths: The checkpoints, in the order of time.
        formats, output, folder, force, show_all: As of a `Delivery`.

    Raises:
        UsageError: As a `Delivery` raises it.
    """

    def __init__(
        self,
        paths: Sequence[str],
        formats: Sequence[str] | None,
        *,
        output: Path | None,
        folder: Path | None,
        force: bool,
        show_all: bool,
    ) -> None:
        from bnprobe.cli.delivery import Delivery
        from bnprobe.records import Comparison, Report
        from bnprobe.report import formats_of

        self._paths, self._scans = paths, dict[str, Delivery]()
        self._only: Delivery | None = None  # for what was measured where there is nothing to compare it with
        compared = formats
        if folder is not None:
            compared = [name for name in formats or [] if name in formats_of("compare")]
            names = zip(paths, _names(paths), strict=True)
            self._scans = {
                path: Delivery(f"scan-{name}", Report, formats, folder=folder, force=force, show_all=show_all)
                for path, name in names
            }
        else:
            self._only = Delivery("scan", Report, formats, output=output, force=force, show_all=show_all)
        self._end = Delivery(
            "compare", Comparison, compared, output=output, folder=folder, force=force, show_all=show_all
        )

    def check(self, target: str, alone: Mapping[str, object]) -> None:
        """Reject files that cannot be written, and options for one checkpoint, before anything is measured.

        Args:
            target: The model, which is not replaced.
            alone: Options that make sense for one checkpoint only, with their values.

        Raises:
            UsageError: One of these options is given, or the scan runs in several processes.
            OutputError: As `Delivery.check` raises it.
        """
        from bnprobe.cli.processes import several_processes

        for option, value in alone.items():
            if value is not None:
                raise UsageError(f"{option} is for one checkpoint, and --checkpoint names {len(self._paths)}.")
        if several_processes():
            raise UsageError("Several checkpoints are scanned in one process only: start it without torchrun.")
        for delivery in (*self._scans.values(), self._end):
            delivery.check([target, *self._paths])

    def scan(self, spec: Spec, measure: Callable[[Spec], Report], exit_zero: bool) -> int:
        """Scan each, write and say what was found, and end with the comparison; the exit code.

        Args:
            spec: What to measure, with any checkpoint.
            measure: Measures one.
            exit_zero: Exit with 0 even with findings.

        Raises:
            BnprobeError, KeyboardInterrupt: A checkpoint could not be scanned; those before it were delivered.
        """
        from bnprobe.analysis.diagnosis import has_findings
        from bnprobe.cli.delivery import with_command
        from bnprobe.cli.streams import say
        from bnprobe.commands.compare import compare_named
        from bnprobe.report.scan import one_line

        reports: list[tuple[str, Report]] = []
        stopped: BaseException | None = None
        for path in self._paths:
            weights = spec.checkpoint.model_copy(update={"path": path})
            report: Report | None
            try:
                report = measure(spec.model_copy(update={"checkpoint": weights}))
            except (BnprobeError, KeyboardInterrupt) as error:
                stopped, report = error, getattr(error, "report", None)
            if report is not None:
                report = with_command(report)
                if path in self._scans:
                    self._scans[path].write(report)
                say(f"{path}: {one_line(report)}")
                reports.append((path, report))
            if report is None or report.scan.partial:
                break
        if len(reports) > 1:
            self._end.deliver(compare_named(reports))
        elif reports and self._only is not None:
            self._only.deliver(reports[0][1])
        if stopped is not None:
            raise stopped
        found = any(has_findings(report, spec.rules) for _, report in reports)
        return EXIT_FINDINGS if found and not exit_zero else EXIT_CLEAN


def _names(paths: Sequence[str]) -> list[str]:
    """Names for files: those of the checkpoints, all of them numbered where some have the same."""
    stems = [Path(path).stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [f"{n}-{stem}" for n, stem in enumerate(stems, start=1)]

"""What to do next: why, and the command, a variant of the one that the user ran."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from bnprobe.records import Layer, Report, Scan
from bnprobe.rules import rule_of

SAVE = {"--format": "json", "--output": "report.json"}

_LARGEST_SUGGESTED = 64
_BATCHES_OF_LARGEST = 4


@dataclass(frozen=True)
class NextStep:
    """Something to do next: why, and the command (None: nothing that a command could do)."""

    why: str
    command: str | None = None


def diagnosed_step(report: Report, command: str) -> NextStep:
    """What follows from the first diagnosis."""
    rule = rule_of(report.diagnoses[0].rule)
    if rule is None:
        return keep_step(command)
    if rule.larger_batches and (step := _measured_sizes_step(report, command) or _try_sizes_step(report, command)):
        return step
    if rule.free_remedy and not report.remedies and _evaluated(report):
        text = "To measure what other statistics would give on the held-out data:"
        return NextStep(text, with_options(command, {"--what-if": ""}))
    return NextStep(f"To read about {rule.code}, with an example:", f"bnprobe explain {rule.code}")


def keep_step(command: str) -> NextStep:
    """There is nothing to find out: save the report."""
    return NextStep("To save the report:", with_options(command, SAVE))


def interrupted_step(report: Report, command: str) -> NextStep | None:
    """Measure to the end, where something cut the scan short."""
    if not report.scan.partial:
        return None
    failed = report.scan.stopped == "failed"
    return NextStep(
        "Fix what the error names, then measure to the end:" if failed else "To measure to the end:", command
    )


def more_batches_step(scan: Scan, command: str) -> NextStep:
    """More batches, to decide what is undecided."""
    # Four times the batches halve the intervals.
    more = str(4 * max(scan.batches, 1))
    if scan.stopped == "data_exhausted":
        text = "All data was used. More data or another --threshold is needed to decide. To save the report:"
        return NextStep(text, with_options(command, SAVE))
    if scan.stopped == "requested":
        return NextStep("To decide, measure more batches:", with_options(command, {"--batches": more}))
    return NextStep("To decide, allow more batches:", with_options(command, {"--max-batches": more}))


def batch_size_step(report: Report, command: str) -> NextStep:
    """What is known of larger batches, or how to find out."""
    return _measured_sizes_step(report, command) or _try_sizes_step(report, command) or keep_step(command)


def _measured_sizes_step(report: Report, command: str) -> NextStep | None:
    sizes = sorted({point.batch_size for layer in report.layers for point in layer.batch_sizes})
    larger = [size for size in sizes if size > report.scan.batch_size]
    enough = [size for size in larger if not under_limit(report.layers, size)]
    if enough:
        return NextStep(
            f"At batch size {enough[0]} no layer is under its limit on the eval path. To check both paths:",
            with_options(command, {"--batch-size": str(enough[0])}),
        )
    if larger:
        return NextStep(
            f"At no batch size up to {larger[-1]} do all layers pass. To save the report:",
            with_options(command, SAVE),
        )
    return None


def _try_sizes_step(report: Report, command: str) -> NextStep | None:
    check = report.scan.self_check
    if check is None or not check.passed:  # samples cannot be regrouped
        return None
    to_try = _sizes_to_try(report.scan)
    if len(to_try) < 2:
        return None
    options = {"--batch-sizes": ",".join(map(str, to_try))}
    needed = _BATCHES_OF_LARGEST * to_try[-1] // report.scan.batch_size
    if report.scan.batches < needed and report.scan.stopped != "data_exhausted":
        options["--batches"] = str(needed)
    return NextStep("To see what a larger batch would change:", with_options(command, options))


def _evaluated(report: Report) -> bool:
    """Whether held-out data was scored, by a loss or metric."""
    return any(gap.held_out is not None for gap in report.summary.gaps)


def under_limit(layers: tuple[Layer, ...], batch_size: int) -> list[Layer]:
    """The layers whose eval-path n_eq at a batch size is below their threshold."""
    return [
        layer
        for layer in layers
        for point in layer.batch_sizes
        if point.batch_size == batch_size
        and point.equivalent_batch_size is not None
        and point.equivalent_batch_size < layer.threshold
    ]


def _sizes_to_try(scan: Scan) -> list[int]:
    """Batch sizes from this one on, each twice the last; no larger than data that is known to be used up."""
    steps = max(3, (_LARGEST_SUGGESTED // scan.batch_size).bit_length() - 1)
    sizes = [scan.batch_size << step for step in range(steps + 1)]
    limit = scan.images if scan.stopped == "data_exhausted" else sizes[-1]
    return [size for size in sizes if size <= limit]


# --- Variants of a command --------------------------------------------------------------------------------------------


def with_options(command: str, options: dict[str, str]) -> str:
    """The command with options set; one that was already there is replaced.

    Args:
        command: A command quoted for a POSIX shell, e.g. ``"bnprobe scan model.py --batch-size 2"``.
        options: Values by option; "" for an option without a value.
    """
    words = _without_options(shlex.split(command), options)
    for option, value in options.items():
        words += [option, value] if value else [option]
    return shlex.join(words)


def _without_options(words: list[str], options: dict[str, str]) -> list[str]:
    """The words of a command without some options and their values, in both spellings."""
    kept: list[str] = []
    remaining = iter(words)
    for word in remaining:
        if word in options:
            if options[word]:
                next(remaining, None)
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return kept

"""Numbers as a reader wants them: few digits, and words where a digit would mislead."""

from __future__ import annotations

from collections.abc import Sequence

from bnprobe.records import Interval, PathMeasurement
from bnprobe.reports.glyphs import INFINITE, UNMEASURED


def equivalent_batch_size(value: float | None) -> str:
    """n_eq, e.g. "2.0", "31.7", "128", ">10k"; None (no mismatch at all) is infinite."""
    if value is None:
        return INFINITE
    if value >= 10_000:
        return ">10k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def equivalent_interval(interval: Interval) -> str:
    """The interval of n_eq, e.g. "1.9 to 2.1"."""
    low, high = interval
    return f"{equivalent_batch_size(low)} to {equivalent_batch_size(high)}"


def mismatch(value: float) -> str:
    """D, e.g. "0.871", "12.4", "2e+06", "<0.001"."""
    if value == 0:
        return "0"
    if value < 0.001:
        return "<0.001"
    if value >= 1000:
        return f"{value:.0e}"
    return f"{value:.3f}" if value < 1 else f"{value:#.3g}".rstrip(".")


def percent(fraction: float) -> str:
    """A share, e.g. "0%", "<0.1%", "3.4%", "36%"."""
    if 0 < fraction < 0.001:
        return "<0.1%"
    if 0.1 > fraction > 0:
        return f"{fraction:.1%}"
    return f"{fraction:.0%}"


def relative(ratio: float) -> str:
    """A relative difference, e.g. "38%"; far beyond 100% as a multiple, e.g. "25 times"."""
    return percent(ratio) if ratio < 10 else f"{ratio:.2g} times"


def count(number: int, noun: str) -> str:
    """A number of things, e.g. "1 layer", "3 layers", "2 micro-batches"."""
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}{ending}"


def path_equivalent(path: PathMeasurement | None) -> str:
    """n_eq of a path, or the sign for a path that could not be measured."""
    return UNMEASURED if path is None else equivalent_batch_size(path.equivalent_batch_size)


def plain(value: float) -> str:
    """A limit or a value of the user's, e.g. "32", "0.3127", without needless zeros."""
    return f"{value:.4g}"


def points_in_line(texts: Sequence[str]) -> list[str]:
    """Numbers filled on the right so that, set flush right, their decimal points stand in line."""
    after = [len(text.partition(".")[2]) + ("." in text) for text in texts]
    blanks = [max(after) - own for own in after]
    return [
        text + " " * (blank if any(char.isdigit() for char in text) else 0)
        for text, blank in zip(texts, blanks, strict=True)
    ]

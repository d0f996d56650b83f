"""Numbers and names as a reader wants them: few, and words where a digit would mislead."""

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


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names in a sentence, e.g. "bn1, bn2", and how many more there are beyond the first so many."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def path_equivalent(path: PathMeasurement | None) -> str:
    """n_eq of a path, or the sign for a path that could not be measured."""
    return UNMEASURED if path is None else equivalent_batch_size(path.equivalent_batch_size)


def plain(value: float) -> str:
    """A limit or a value of the user's, e.g. "32", "0.3127", without needless zeros."""
    return f"{value:.4g}"


def score(value: float) -> str:
    """A loss or metric, e.g. "1.92", "0.0077"."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.4g}"


def points_in_line(texts: Sequence[str]) -> list[str]:
    """Numbers filled on the right so that, set flush right, their decimal points stand in line."""
    after = [len(text.partition(".")[2]) + ("." in text) for text in texts]
    blanks = [max(after) - own for own in after]
    return [
        text + " " * (blank if any(char.isdigit() for char in text) else 0)
        for text, blank in zip(texts, blanks, strict=True)
    ]


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign, e.g. "+1.67", "-0.045", "0"."""
    text = f"{value:+.{digits}g}"
    return "0" if float(text) == 0 else text


def size(number: int) -> str:
    """A number of bytes, e.g. "812 B", "1.2 MiB"."""
    value, units = float(number), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def span(interval: Interval | None) -> str:
    """An interval of D in words for brackets, e.g. "0.80 to 0.91", "over 0.80"; empty for None."""
    if interval is None:
        return ""
    low, high = interval
    return f"over {mismatch(max(low, 0))}" if high is None else f"{mismatch(max(low, 0))} to {mismatch(max(high, 0))}"

"""How the figures of a report are written; see ``bnprobe.numbers`` for those of messages too."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TypeVar

from rich.cells import cell_len

from bnprobe.numbers import count, listed, percent
from bnprobe.numbers import mismatch as mismatch
from bnprobe.numbers import score as score
from bnprobe.records import Estimate, Impact, Interval, PathMeasurement, Scan
from bnprobe.report.page import INFINITE, UNMEASURED, Page, pad

_MOST_LISTED = 120
_PLUS_MINUS = "±"
_MOST_DECIMALS = 5
_LARGE = 1e5

_Value = TypeVar("_Value")


def known(value: _Value | None, write: Callable[[_Value], str]) -> str:
    """A figure as it is written, or the sign for one that was not measured."""
    return UNMEASURED if value is None else write(value)


def equivalent_batch_size(value: float | None) -> str:
    """n_eq, e.g. "2.0", "31.7", "128", ">10k"; None (no mismatch at all) is infinite."""
    if value is None:
        return INFINITE
    if value >= 10_000:
        return ">10k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def below(value: float | None, limit: float) -> str:
    """n_eq, with as many digits as show that it is below a limit, e.g. "31.97"."""
    text = equivalent_batch_size(value)
    if value is None or not value < limit <= float(text.removeprefix(">").replace("k", "e3")):
        return text
    return f"{math.floor(100 * value) / 100:.2f}"


def equivalent_interval(interval: Interval) -> str:
    """The interval of n_eq, e.g. "1.9 to 2.1"."""
    low, high = interval
    return f"{equivalent_batch_size(low)} to {equivalent_batch_size(high)}"


def path_equivalent(path: PathMeasurement | None) -> str:
    """n_eq of a path, or the sign for a path that could not be measured."""
    return known(path, lambda found: equivalent_batch_size(found.equivalent_batch_size))


def path_mismatch(path: PathMeasurement | None) -> str:
    """D of a path, or the sign for a path that could not be measured."""
    return known(path, lambda found: mismatch(found.mismatch))


def span(interval: Interval | None) -> str:
    """An interval of D in words, e.g. "0.80 to 0.91", "over 0.80"; empty for None."""
    if interval is None:
        return ""
    low, high = interval
    return f"over {mismatch(max(low, 0))}" if high is None else f"{mismatch(max(low, 0))} to {mismatch(max(high, 0))}"


def relative(ratio: float) -> str:
    """A relative difference, e.g. "38%"; far beyond 100% as a multiple, e.g. "25 times"."""
    return percent(ratio) if ratio < 10 else f"{ratio:.2g} times"


def output_change(impact: Impact | None) -> str:
    """How far the outputs change if one layer alone uses batch statistics, e.g. "12%"; an estimate is "~12%"."""
    if impact is not None and impact.exact is not None:
        return relative(impact.exact)
    return "" if impact is None or impact.estimate is None else f"~{relative(impact.estimate)}"


def data(scan: Scan) -> str:
    """Where the data of a scan came from, e.g. "load_data of model.py (1,437 images)"."""
    described = with_samples(scan.data, scan)
    return f"{described} (synthetic)" if scan.synthetic else described


def with_samples(text: str, scan: Scan) -> str:
    """The description of data, which ends in the number of its samples, with the word for these."""
    return re.sub(r"\((\d+) samples\)$", lambda found: f"({count(int(found[1]), scan.sample)})", text)


def plain(value: float) -> str:
    """A limit or a value of the user's, e.g. "32", "0.3127", without needless zeros."""
    return f"{value:.4g}"


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign, e.g. "+1.67", "-0.045", "0"."""
    text = f"{value:+.{digits}g}"
    return "0" if float(text) == 0 else text


def signed_interval(interval: Interval) -> str:
    """An interval of a difference, e.g. "-1.9 to -1.8"."""
    low, high = interval
    return f"{signed(low, 2)} to {'infinity' if high is None else signed(high, 2)}"


def size(number: int) -> str:
    """A number of bytes, e.g. "812 B", "1.2 MiB"."""
    value, units = float(number), ["B", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """A time, e.g. "4.2 s", "12 min", "3.4 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def points_in_line(texts: Sequence[str]) -> list[str]:
    """Numbers filled on the right so that, set flush right, their decimal points stand in line."""
    after = [len(text.partition(".")[2]) + ("." in text) for text in texts]
    blanks = [max(after) - own for own in after]
    return [
        text + " " * (blank if any(char.isdigit() for char in text) else 0)
        for text, blank in zip(texts, blanks, strict=True)
    ]


def listed_in_line(names: Sequence[str], show_all: bool) -> str:
    """Names, the first few of many, e.g. "bn1, bn2 and 7 more"; at least two, and about a line and a half of them."""
    ends = accumulate(len(name) + 2 for name in names)
    fitting = max(2, sum(end <= _MOST_LISTED for end in ends))
    return listed(names, len(names) if show_all or len(names) <= fitting + 1 else fitting)


# --- Means with their intervals ---------------------------------------------------------------------------------------


def estimate(value: Estimate, with_sign: bool = False) -> str:
    """A mean and half its 95% interval, e.g. "0.971 ± 0.004"; without an interval the mean alone.

    An interval that ends at a bound of the figure, so that the mean is not in its middle, is written with its ends:
    "0.97 (0.93 to 1)".
    """
    low, high = value.interval or (None, None)
    if low is not None and high is not None and abs(low + high - 2 * value.mean) > 0.01 * (high - low):
        mean, _ = _parts(value, with_sign)
        decimals = _decimals((high - low) / 2)
        ends = (score(each if decimals is None else round(each, decimals)) for each in (low, high))
        return f"{mean} ({' to '.join(ends)})"
    return " ".join(part for part in _parts(value, with_sign) if part)


def estimates(values: Sequence[Estimate | None], page: Page, signed: Sequence[bool] = ()) -> list[str]:
    """Estimates one below the other: decimal points in line, then the intervals; None: not measured.

    Args:
        values: From top to bottom.
        page: What they are written on.
        signed: Which of them are differences; empty: none.
    """
    pairs = zip(values, signed or [False] * len(values), strict=True)
    parts = [(UNMEASURED, "") if value is None else _parts(value, sign) for value, sign in pairs]
    means = points_in_line([page.clean(mean) for mean, _ in parts])
    halves = [page.clean(half) for _, half in parts]
    width, after = max(map(cell_len, means)), max(map(cell_len, halves))
    return [
        f"{pad(mean, width, right=True)} {pad(half, after)}" if after else pad(mean, width, right=True)
        for mean, half in zip(means, halves, strict=True)
    ]


def _parts(value: Estimate, with_sign: bool) -> tuple[str, str]:
    """The mean, and half the interval after its sign."""
    low, high = value.interval or (0.0, None)
    if high is None:
        return _score(value.mean, with_sign), ""
    half = (high - low) / 2
    decimals = _decimals(half)
    if decimals is None or abs(value.mean) >= _LARGE:
        return _score(value.mean, with_sign), f"{_PLUS_MINUS} {score(half)}"
    mean = f"{value.mean:{'+' if with_sign else ''}.{decimals}f}"
    mean = mean.lstrip("+-") if float(mean) == 0 else mean  # no sign of zero
    return mean, f"{_PLUS_MINUS} {half:.{decimals}f}"


def _decimals(half: float) -> int | None:
    """Decimals that an uncertainty leaves: two of its digits up to 35, one above; None where that is no help."""
    if half <= 0:
        return None
    exponent = math.floor(math.log10(half))
    leading = half / 10**exponent
    decimals = -exponent + (1 if leading < 3.55 else 0)
    return max(decimals, 0) if decimals <= _MOST_DECIMALS else None


def _score(value: float, with_sign: bool) -> str:
    return signed(value) if with_sign else score(value)

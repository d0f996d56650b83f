"""What was measured beyond the two paths, and what it took."""

from __future__ import annotations

from rich.text import Text

from bnprobe.records import ExtraPass, Pool, Scan
from bnprobe.reports import figures
from bnprobe.reports.layout import Page


def cost(scan: Scan, page: Page) -> list[Text]:
    """Extra passes with their reason, and the pool of images that were regrouped."""
    sentences = [*map(_pass, scan.passes), *([_pool(scan.pool)] if scan.pool is not None else [])]
    lines = [line for text in sentences for line in page.paragraph(text, first="  ", rest="    ")]
    return [*page.heading("Measured beyond the two paths"), *lines] if lines else []


def _pass(extra: ExtraPass) -> str:
    reason = extra.reason.removesuffix(".")
    why = f" ({reason})" if reason else ""
    return f"{extra.name}: {figures.count(extra.images, 'image')}, {extra.seconds:.1f} s{why}"


def _pool(pool: Pool) -> str:
    return (
        f"pool: {figures.count(pool.images, 'image')}, {figures.size(pool.bytes)}, for the share of composition:"
        f" regrouped at random into {figures.count(pool.regrouped, 'micro-batch')}"
    )

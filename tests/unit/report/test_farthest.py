"""What the report of a table says about each batch."""

from __future__ import annotations

from fabricated_documents import tabled

from bnprobe.report.batch_effects import farthest


def test_as_many_features_as_fit_are_named_the_farthest_first() -> None:
    found = tabled()
    off = found.batches[1]
    assert farthest(found, off) == "IL6 (+5.2), TNF (-1.3)"
    assert farthest(found, off, 1) == "IL6 (+5.2)"

"""What a report says of the self-check: no more than was compared."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rendered import text_of

from bnprobe.records import SelfCheck
from unit.report.fabricated_reports import healthy

EXACT = SelfCheck(0.0, 0.0, 1e-4, True, None)

SAID = {
    "passed: micro-batches run together and one by one agree exactly.": EXACT,
    "passed: micro-batches run together and one by one agree to 3e-06.": replace(EXACT, output_error=3e-6),
    "passed: micro-batches run together and one by one agree exactly at inference.": replace(EXACT, paths=("eval",)),
    "passed: in float64, micro-batches run together and one by one agree to 1e-11.": replace(
        EXACT, statistic_error=1e-11, float64=True
    ),
    "passed: without random layers, micro-batches run together and one by one agree exactly; with them, none changes"
    " another.": replace(EXACT, paths=("steady", "eval", "train")),
    "failed: micro-batches run together and one by one differ by 5e-01, first in body.bn.": replace(
        EXACT, statistic_error=0.5, passed=False, first_layer="body.bn"
    ),
    "failed: with random layers, replacing a micro-batch changes the others; they differ by 5e-01, first in body.bn.": (
        replace(EXACT, statistic_error=0.5, passed=False, first_layer="body.bn", paths=("steady", "eval", "train"))
    ),
}


@pytest.mark.parametrize("sentence", SAID)
def test_the_sentence_is_what_was_compared(sentence: str) -> None:
    report = healthy()
    text = text_of(replace(report, scan=replace(report.scan, self_check=SAID[sentence])))
    assert f"Self-check {sentence}" in " ".join(text.split())

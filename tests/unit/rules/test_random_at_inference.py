"""BN213."""

from __future__ import annotations

import pytest

from bnprobe.records import Output
from bnprobe.testing import make_evidence, make_layer, run_rule
from unit.rules.expect import skipped


@pytest.mark.parametrize(
    ("repeat", "outcome", "severity"),
    [(0.0, "passed", "error"), (1e-6, "passed", "error"), (0.005, "failed", "warning"), (0.4, "failed", "error")],
)
def test_it_is_an_error_where_the_output_really_moves(repeat: float, outcome: str, severity: str) -> None:
    output = Output(0.1, None, None, None, None, repeat=repeat)
    [verdict] = run_rule("BN213", make_evidence(make_layer(), output=output))
    assert (verdict.outcome, verdict.severity, verdict.value) == (outcome, severity, repeat)


def test_one_pass_says_nothing() -> None:
    facts = make_evidence(make_layer(), output=Output(0.1, None, None, None, None))
    assert run_rule("BN213", facts) == [skipped("BN213", None, "inference was not run twice")]

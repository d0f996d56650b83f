"""What a repair must prove, as it is typed."""

from __future__ import annotations

import pytest

from bnprobe.config.requirements import check_requirements, parse_requirement
from bnprobe.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value", "held"),
    [
        ("metric>=0.97", 0.97, True),
        ("metric>0.97", 0.97, False),
        (" loss <= 1e-1 ", 0.1, True),
        ("loss<0.1", 0.1, False),
        ("flagged==0", 0.0, True),
        ("gain>-0.01", -0.005, True),
        ("metric>=0.97", None, False),  # not measured
        ("metric>=0.97", float("nan"), False),
    ],
)
def test_a_requirement_holds_or_not(text: str, value: float | None, held: bool) -> None:
    assert parse_requirement(text).holds(value) is held


@pytest.mark.parametrize(
    "text", ["metric", "metric=1", "metric=>1", ">=1", "metric>=", "metric>=nan", "metric>=inf", ""]
)
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a requirement"):
        parse_requirement(text)


def test_an_unknown_quantity_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r'quantity "metrics" \(known: metric, loss, gain, flagged\); .* is metric'):
        parse_requirement("metrics>=1")


def test_every_requirement_is_checked() -> None:
    found = check_requirements(("metric>=0.9", "gain>0"), {"metric": 0.95, "gain": None})
    assert [(requirement.text, value, held) for requirement, value, held in found] == [
        ("metric>=0.9", 0.95, True),
        ("gain>0", None, False),
    ]

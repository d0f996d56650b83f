"""Numbers and names in sentences."""

from __future__ import annotations

import pytest

from bnprobe.numbers import count, joined, listed, number, percent


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.3141, "0.31"), (12.44, "12.4"), (-1234.5, "-1,234"), (2.5e6, "2.5e+06"), (1.0, "1")],
)
def test_a_number_has_two_or_three_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("fraction", "text"), [(0.0, "0%"), (0.0004, "<0.1%"), (0.034, "3.4%"), (0.1, "10%"), (0.364, "36%"), (1.0, "100%")]
)
def test_a_small_percentage_keeps_a_digit(fraction: float, text: str) -> None:
    assert percent(fraction) == text


@pytest.mark.parametrize(
    ("amount", "noun", "text"),
    [
        (1, "layer", "1 layer"),
        (0, "layer", "0 layers"),
        (1200, "batch", "1,200 batches"),
        (2, "class", "2 classes"),
        (2, "assay", "2 assays"),
        (2, "city", "2 cities"),
    ],
)
def test_things_are_counted(amount: int, noun: str, text: str) -> None:
    assert count(amount, noun) == text


def test_many_names_are_counted_rather_than_listed() -> None:
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(["a", "b", "c", "d"], 2) == "a, b and 2 more"


def test_few_names_are_joined() -> None:
    assert [joined(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]

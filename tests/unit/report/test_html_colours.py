"""The colours of pages: text can be read on every ground, and marks differ also for those who see fewer colours."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from importlib import resources

import pytest

from bnprobe.records import SOURCES
from bnprobe.report.html.network_charts import SOURCE_COLOURS

CSS = resources.files("bnprobe.report.html").joinpath("page.css").read_text(encoding="utf-8")
SCHEMES = dict(
    zip(
        ("light", "dark", "print"),
        (
            dict(re.findall(r"--([\w-]+): (#[0-9a-f]+);", block))
            for block in re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
        ),
        strict=True,
    )
)
TEXT = ("ink", "soft", "accent", "flagged", "undecided", "fine", "unmeasured", "remark")
GROUNDS = ("paper", "raised", "flagged-paper", "undecided-paper", "fine-paper")
MARKS = (*SOURCE_COLOURS.values(), *(f"line-{number}" for number in range(1, 7)), "before", "after")

HEAT = tuple(f"heat-{number}" for number in range(6))

# Machado, Oliveira and Fernandes 2009, severity 1.
VISIONS = {
    "all colours": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def linear(colour: str) -> list[float]:
    """Linear red, green and blue of a colour of sRGB."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2."""
    weights = (0.2126, 0.7152, 0.0722)
    lights = sorted(sum(w * part for w, part in zip(weights, linear(each), strict=True)) for each in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def lab(rgb: Sequence[float]) -> tuple[float, float, float]:
    """CIE L*a*b* of linear red, green and blue, D65."""
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    white = (0.9505, 1.0, 1.089)
    x, y, z = (
        value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116
        for value in (sum(a * b for a, b in zip(row, rgb, strict=True)) / w for row, w in zip(rows, white, strict=True))
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def seen(colour: str, vision: str) -> tuple[float, float, float]:
    """What somebody sees of a colour."""
    rgb = linear(colour)
    return lab([min(max(sum(a * b for a, b in zip(row, rgb, strict=True)), 0), 1) for row in VISIONS[vision]])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_stands_out_from_every_ground(scheme: str) -> None:
    colours = SCHEMES["light"] | SCHEMES[scheme]
    for text, ground in itertools.product(TEXT, GROUNDS):
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_marks_of_charts_stand_out_from_the_page(scheme: str) -> None:
    colours = SCHEMES["light"] | SCHEMES[scheme]
    for mark in MARKS:
        assert contrast(colours[mark], colours["paper"]) >= 3, mark


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_sources_of_mismatch_are_told_apart(scheme: str, vision: str) -> None:
    colours = SCHEMES["light"] | SCHEMES[scheme]
    for one, other in itertools.combinations(SOURCES, 2):
        pair = [seen(colours[SOURCE_COLOURS[source.field]], vision) for source in (one, other)]
        assert math.dist(*pair) > 15, (one.field, other.field)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_kinds_of_n_eq_are_told_apart(scheme: str, vision: str) -> None:
    colours = SCHEMES["light"] | SCHEMES[scheme]
    for one, other in itertools.combinations((*HEAT, "paper"), 2):
        least = 15 if {one, other} != {HEAT[-1], "paper"} else 5  # what was not measured may be like what is best
        assert math.dist(seen(colours[one], vision), seen(colours[other], vision)) > least, (one, other)


def test_every_colour_of_a_chart_is_one_of_the_style_sheet() -> None:
    assert {*MARKS, "good", "bad", "flagged", "undecided", "fine", "unmeasured"} <= SCHEMES["light"].keys()
    for name in (*MARKS, *HEAT, "ink"):
        assert f".key .{name} {{" in CSS

"""What holds for the text of every document: it fits the width, colour adds colour only, and ASCII is ASCII."""

from __future__ import annotations

import re

import pytest
from fabricated_documents import CASES, document
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from bnprobe.report import RenderOptions, render
from bnprobe.report.page import Page

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
TO_PASTE = "    "
"""How lines begin that are pasted as a whole and therefore never broken."""

UNWRAPPED = ("lint",)
"""Documents that editors and CI read line by line."""


def text_of(kind: str, name: str, **options: object) -> str:
    """The text of a case."""
    return render(document(kind, name), "terminal", RenderOptions(**options))  # type: ignore[arg-type]


@settings(max_examples=120)
@given(
    case=st.sampled_from(CASES),
    width=st.integers(40, 160),
    unicode=st.booleans(),
    color=st.booleans(),
    show_all=st.booleans(),
)
def test_every_document_fits_every_page(
    case: tuple[str, str], width: int, unicode: bool, color: bool, show_all: bool
) -> None:
    text = text_of(*case, width=width, unicode=unicode, color=color, show_all=show_all)
    plain = ESCAPES.sub("", text)
    assert plain == text_of(*case, width=width, unicode=unicode, show_all=show_all)
    assert color or "\x1b" not in text
    assert unicode or plain.isascii()
    assert text.endswith("\n")
    lines = plain.splitlines()
    assert [line for line in lines if line != line.rstrip()] == []
    if case[0] not in UNWRAPPED:
        assert [line for line in lines if cell_len(line) > width and not line.startswith(TO_PASTE)] == []


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_colours_are_used_where_they_may_be(case: tuple[str, str]) -> None:
    assert bool(ESCAPES.search(text_of(*case, color=True))) is (case != ("lint", "clean"))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_only_commands_and_code_are_wider_than_the_page(case: tuple[str, str]) -> None:
    text = text_of(*case, width=80, show_all=True)
    assert case[0] in UNWRAPPED or max(map(cell_len, text.splitlines())) <= 80


@pytest.mark.parametrize("kind", ["scan", "sweep", "plan", "repair", "verify"])
def test_a_narrower_terminal_is_treated_as_one_of_40_columns(kind: str) -> None:
    name = next(name for found, name in CASES if found == kind)
    assert text_of(kind, name, width=10) == text_of(kind, name, width=40)


def test_a_wider_terminal_is_treated_as_one_of_1000_columns() -> None:
    assert text_of("scan", "flagged", width=10**12) == text_of("scan", "flagged", width=1000)


def test_dotted_names_are_shortened_between_their_parts() -> None:
    names = [f"features.denseblock1.denselayer{number}.norm{kind}" for number in (9, 10) for kind in (1, 2)]
    assert Page(80, unicode=True).shorten(names, 30) == [
        "features.….denselayer9.norm1",
        "features.….denselayer9.norm2",
        "features.….denselayer10.norm1",
        "features.….denselayer10.norm2",
    ]

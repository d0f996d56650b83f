"""Text that is not bnprobe's own is shown without being obeyed, in JSON without being changed."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnprobe.printable import LONGEST_LINE, LONGEST_WORD, MOST_LINES, cut, escaped, escaped_json, message, short_words

ANY = st.text(st.characters(exclude_categories=()))
"""Text of any characters, halves of pairs included."""


def is_harmless(text: str) -> bool:
    return all(unicodedata.category(char)[0] != "C" and char not in "\u2028\u2029" for char in text)


@given(ANY)
def test_nothing_is_left_that_a_terminal_obeys(text: str) -> None:
    shown = escaped(text)
    assert is_harmless(shown)
    shown.encode()
    assert escaped(shown) == shown
    assert is_harmless(message(text).replace("\n", "").replace("\t", ""))


@pytest.mark.parametrize("text", ["bn1", "layer4.1.bn2", "名前", "é ✗ ▁█│×", "\N{GRINNING FACE}"])
def test_what_can_be_seen_stays(text: str) -> None:
    assert escaped(text) == message(text) == short_words(text) == text


def test_line_breaks_and_tabs_of_a_message_stay() -> None:
    assert message("one\n\ttwo\x1b[2J\r") == "one\n\ttwo\\x1b[2J\\r"


@pytest.mark.parametrize("command", ["::error::x", " \t::add-mask::x", "##[error]x", "x ##vso[task.complete]"])
def test_no_line_of_a_message_is_a_command_in_the_log_of_a_ci_job(command: str) -> None:
    line = message(f"the key a\n{command}").split("\n")[1]
    assert not line.lstrip().startswith("::")
    assert "##" not in line
    assert line.replace(r"\x3a", ":").replace(r"\x23", "#") == command


@given(st.text(st.characters(exclude_categories=("Cs",))), st.booleans())
def test_json_means_the_same(text: str, ascii_only: bool) -> None:
    shown = escaped_json(json.dumps({text: [text]}, ensure_ascii=False, indent=2), ascii_only)
    assert is_harmless(shown.replace("\n", ""))
    assert json.loads(shown) == {text: [text]}
    assert shown.isascii() or not ascii_only


def test_bytes_of_a_file_name_that_are_no_text() -> None:
    name = b"w\xff.py".decode("utf-8", "surrogateescape")
    assert escaped(name) == "w\\udcff.py"
    assert json.loads(escaped_json(json.dumps(name, ensure_ascii=False))) == "w\\udcff.py"


def test_what_is_too_long_is_cut_in_the_middle_and_counted() -> None:
    assert cut("a" * 90 + "b" * 30, 100) == "a" * 75 + "[... 20 characters ...]" + "b" * 25
    long = message("Unknown key " + "k" * 10**6 + "; the known keys are a, b.")
    assert len(long) < LONGEST_LINE + 50
    assert long.endswith("k; the known keys are a, b.")
    assert f"[... {10**6 + len('Unknown key ; the known keys are a, b.') - LONGEST_LINE:,} characters ...]" in long
    words = short_words(f"one {'w' * 10**5} two")
    assert words.startswith("one w")
    assert words.endswith("w two")
    assert len(words) < LONGEST_WORD + 50
    lines = message("line\n" * 10**5).split("\n")
    assert len(lines) == MOST_LINES + 1
    assert "[... 99,801 lines ...]" in lines

"""Mutants are found wherever their definition is, and never planted in the wrong place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tools.mutants import (
    Checkout,
    Code,
    Mutant,
    NotFoundError,
    Result,
    Table,
    confirmed,
    judge,
    read_table,
    stages_for,
)

SOURCE = '''"""About a - b."""


class Mean:
    """Of values; total / count."""

    def value(self, total, count):
        """Return total / count."""
        return total / count  # σ

    def error(self, total, count):
        return (
            total
            / count
        )


def value(total, count):
    return 0 if count == 0 else total / counted


ORDER = ("lag", "dropout")
'''


def mutant(definition: str, find: str, replace: str, within: str = "") -> Mutant:
    return Mutant("a-fault", "stats", definition, find, replace, within)


@pytest.fixture
def code(tmp_path: Path) -> Code:
    folder = tmp_path / "package" / "stats"
    folder.mkdir(parents=True)
    (folder / "means.py").write_text(SOURCE, encoding="utf-8")
    return Code(tmp_path / "package")


def test_a_fragment_is_replaced_in_the_definition_and_not_in_its_docstring(code: Code) -> None:
    path, content = code.mutated(mutant("Mean.value", "total / count", "total * count"))
    assert path.name == "means.py"
    assert content.decode() == SOURCE.replace("return total / count", "return total * count")


def test_white_space_does_not_matter(code: Code) -> None:
    _, content = code.mutated(mutant("Mean.error", "return (total / count)", "return total"))
    assert "def error(self, total, count):\n        return total\n" in content.decode()


def test_constants_are_definitions(code: Code) -> None:
    _, content = code.mutated(mutant("ORDER", '"lag", "dropout"', '"dropout", "lag"'))
    assert 'ORDER = ("dropout", "lag")' in content.decode()


@pytest.mark.parametrize(
    ("definition", "find", "message"),
    [
        ("Median.value", "total / count", r"no Median\.value; the source stands in: .*Mean\.value \(stats/means\.py\)"),
        ("Mean.value", "total - count", "does not hold the source just once; .* no definition"),
        ("Mean.value", "total", "does not hold the source just once"),  # twice
        ("value", "total / count", "does not hold the source just once"),  # the name is longer there
    ],
)
def test_what_is_not_there_just_once_is_not_found(code: Code, definition: str, find: str, message: str) -> None:
    with pytest.raises(NotFoundError, match=message):
        code.find(mutant(definition, find, "0"))


def test_the_same_source_in_two_files_needs_a_part_of_the_path(code: Code, tmp_path: Path) -> None:
    (tmp_path / "package" / "other.py").write_text(SOURCE, encoding="utf-8")
    both = Code(tmp_path / "package")
    with pytest.raises(NotFoundError, match="several places"):
        both.find(mutant("Mean.value", "total / count", "0"))
    assert both.find(mutant("Mean.value", "total / count", "0", within="stats/")).path.name == "means.py"


@pytest.mark.parametrize("replacement", ["total /", "total / (count)"])
def test_a_fault_that_is_no_python_or_changes_nothing_is_refused(code: Code, replacement: str) -> None:
    with pytest.raises(ValueError, match="the replacement"):
        code.mutated(mutant("Mean.value", "total / count", replacement))


def test_tests_of_the_area_come_before_wider_ones_and_those_that_are_gone_are_left_out(tmp_path: Path) -> None:
    for name in ("stats", "measure"):
        (tmp_path / "tests" / "unit" / name).mkdir(parents=True)
    (tmp_path / "tests" / "unit" / "stats" / "test_ema.py").touch()
    areas = {"stats": ["tests/unit/stats", "tests/unit/gone"]}
    found = Mutant("a-fault", "stats", "f", "a", "b", first=("test_ema.py", "test_gone.py"))
    stages = stages_for(found, Table((found,), areas, ["tests/unit", "tests/functional"]), tmp_path)
    assert stages == [["tests/unit/stats/test_ema.py"], ["tests/unit/stats"], ["tests/unit"]]


class _Tests(Checkout):
    """Tests that fail where the file on disk has one of some words."""

    def __init__(self, folder: Path, words: dict[str, str]) -> None:
        super().__init__(folder, timeout=1.0)
        self._words = words

    def _failures(self, arguments: Sequence[str]) -> list[str]:
        content = (self.folder / "package" / "stats" / "means.py").read_text(encoding="utf-8")
        return [test for test in arguments if self._words.get(test, "?") in content]


def judged(code: Code, checkout: Checkout, find: str = "total / count") -> Result:
    result = judge(mutant("Mean.value", find, "total * count"), 1, code, checkout, [["narrow"], ["wide"]])
    return confirmed([result], checkout)[0]


def test_a_mutant_is_caught_by_a_test_that_passes_without_it(code: Code, tmp_path: Path) -> None:
    found = judged(code, _Tests(tmp_path, {"wide": "total * count"}))
    assert (found.outcome, found.test, found.path) == ("caught", "wide", "package/stats/means.py")
    assert (tmp_path / "package" / "stats" / "means.py").read_text(encoding="utf-8") == SOURCE


def test_a_test_that_fails_anyway_proves_nothing(code: Code, tmp_path: Path) -> None:
    assert judged(code, _Tests(tmp_path, {"narrow": "total"})).outcome == "unclear"


def test_survivors_and_what_is_not_found_are_no_catch(code: Code, tmp_path: Path) -> None:
    assert judged(code, _Tests(tmp_path, {})).outcome == "survived"
    assert judged(code, _Tests(tmp_path, {}), find="total // count").outcome == "not found"


def test_the_table_has_enough_mutants_in_every_area() -> None:
    areas = [each.area for each in read_table().mutants]
    assert len(areas) >= 48
    least = {"stats": 10, "measure": 12, "rules": 10, "repairs": 10, "training": 6}
    assert all(areas.count(area) >= number for area, number in least.items())

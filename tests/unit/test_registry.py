"""Registries: rows from bnprobe, from a caller, and from another package's entry points."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bnprobe.errors import RepairError, UsageError
from bnprobe.registry import Registry


def colours(group: str = "bnprobe.nothing") -> Registry[str]:
    return Registry(group, ["red", "green"], str.lower, "colour", RepairError)


def test_rows_stand_in_the_order_given() -> None:
    registry = colours()
    registry.add("Blue")
    assert registry.names() == ("red", "green", "blue")
    assert list(registry) == ["red", "green", "Blue"]
    assert len(registry) == 3
    assert registry["blue"] == "Blue"
    assert "blue" in registry
    assert "Blue" not in registry


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(RepairError, match=r'no colour named "gren" \(known: red, green\); did you mean green\?'):
        colours()["gren"]
    with pytest.raises(RepairError, match=r'no colour named "ochre" \(known: red, green\)$'):
        colours()["ochre"]


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match='already a colour named "red"'):
        colours().add("RED")


def test_a_row_for_the_length_of_a_block() -> None:
    registry = colours()
    with registry.including("blue"):
        assert "blue" in registry
    assert registry.names() == ("red", "green")


def test_a_row_for_a_block_stands_in_for_one_of_its_name() -> None:
    registry = colours()
    with registry.including("RED"):
        assert registry["red"] == "RED"
    assert list(registry) == ["red", "green"]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Another package that brings a row: metadata and a module, as pip would install them."""
    info = tmp_path / "paint-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: paint\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bnprobe.colours]\npurple = paint_module:PURPLE\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("paint_module", None)


def test_another_package_adds_a_row_by_an_entry_point(package: Path) -> None:
    (package / "paint_module.py").write_text('PURPLE = "purple"\n')
    assert colours("bnprobe.colours").names() == ("red", "green", "purple")


def test_an_entry_point_that_cannot_be_loaded_is_named(package: Path) -> None:
    (package / "paint_module.py").write_text("raise RuntimeError('no paint left')\n")
    registry = colours("bnprobe.colours")
    for _ in range(2):  # it does not go unnoticed the second time
        with pytest.raises(UsageError, match=r'"purple" of the entry-point group bnprobe\.colours .*no paint left'):
            registry.names()


def test_a_package_that_was_installed_or_removed_meanwhile(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = colours("bnprobe.colours")
    (package / "paint_module.py").write_text('PURPLE = "purple"\n')
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [place for place in sys.path if place != str(package)])
        assert registry.names() == ("red", "green")
    assert registry.names() == ("red", "green")
    registry.reload()
    assert registry.names() == ("red", "green", "purple")
    registry.add("blue")
    (package / "paint-1.0.dist-info" / "entry_points.txt").unlink()
    registry.reload()
    assert registry.names() == ("red", "green", "blue")

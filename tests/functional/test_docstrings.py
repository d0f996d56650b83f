"""The examples in the docstrings of the public functions and results run, and each has one."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest

import bnprobe

DOCUMENTED = [name for name in bnprobe.__all__ if callable(getattr(bnprobe, name))]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_runs_as_it_stands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the lines of the package's own docstring, in an interpreter that knows no other names."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for what, title in ((bnprobe, "bnprobe"), (getattr(bnprobe, name), name)):
        (found,) = doctest.DocTestFinder(recurse=False).find(what, title, globs={})
        assert found.examples
        found.globs = names
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, clear_globs=False).failed == 0


def test_the_public_names_are_what_completion_shows() -> None:
    assert dir(bnprobe) == sorted(bnprobe.__all__)
    assert dir(bnprobe.records) == sorted(bnprobe.records.__all__)
    assert all(hasattr(bnprobe, name) for name in bnprobe.__all__)


@pytest.mark.parametrize("name", ["scan", "sweep", "recalibrate", "export", "profile"])
def test_calls_have_one_style(name: str) -> None:
    """Model, batches, batch size, where a call takes them; all else by keyword."""
    signature = inspect.signature(getattr(bnprobe, name))
    positional = [each.name for each in signature.parameters.values() if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert [each for each in positional if each != "path"] == ["model", "batches", "batch_size"]

"""What surrounds the imports of a command."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from bnprobe.cli.processes import importing


@pytest.fixture(autouse=True)
def _thawed() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_was_imported_is_never_looked_through_for_garbage() -> None:
    with importing():
        assert not gc.isenabled()
        imported = [[]]
    assert gc.isenabled()
    assert gc.is_tracked(imported)
    assert not any(each is imported for each in gc.get_objects())


def test_garbage_is_collected_after_an_import_that_failed() -> None:
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_a_process_that_collects_no_garbage_goes_on_so() -> None:
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()

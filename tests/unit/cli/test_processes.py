"""What surrounds the imports of a command."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Iterator

import pytest

import bnprobe.distributed  # noqa: F401 (what imports torch in a launch)
from bnprobe.cli.processes import collect_garbage, collect_no_garbage, importing, run_together


@pytest.fixture(autouse=True)
def _nothing_is_frozen() -> Iterator[None]:
    """As in a process that has just begun; tests freeze what was imported for them."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.fixture
def _without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")


@pytest.mark.usefixtures("_without_torch")
def test_what_was_imported_is_never_looked_through_for_garbage() -> None:
    with importing():
        assert not gc.isenabled()
        imported = [[]]
    assert gc.isenabled()
    assert gc.is_tracked(imported)
    assert not any(each is imported for each in gc.get_objects())


@pytest.mark.usefixtures("_without_torch")
def test_nor_is_what_a_process_of_a_launch_imports_to_join_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    frozen: list[int] = []
    with pytest.raises(SystemExit):
        run_together(lambda ends: frozen.append(gc.get_freeze_count()))
    assert frozen[0] > 0
    assert gc.isenabled()


@pytest.mark.usefixtures("_without_torch")
def test_no_garbage_is_looked_for_until_the_work_begins() -> None:
    collect_no_garbage()
    assert not gc.isenabled()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    collect_garbage()
    assert gc.get_freeze_count() == frozen


@pytest.mark.usefixtures("_without_torch")
def test_a_process_that_collects_no_garbage_is_left_as_it_is() -> None:
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.usefixtures("_without_torch")
def test_garbage_is_collected_after_an_import_that_failed() -> None:
    with pytest.raises(ImportError), importing():
        raise ImportError
    assert gc.isenabled()


def test_a_process_that_has_torch_already_is_left_as_it_is() -> None:
    frozen = gc.get_freeze_count()
    with importing():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen

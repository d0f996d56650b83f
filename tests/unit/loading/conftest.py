"""Each test of loading begins and leaves ``sys.path`` and ``sys.modules`` as a new process would find them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.imports import as_in_a_new_process


@pytest.fixture(autouse=True)
def _clean_imports() -> Iterator[None]:
    with as_in_a_new_process():
        yield

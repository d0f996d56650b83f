"""Each functional test has a folder of its own, in which the installed command runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from functional.command import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)

"""What holds for every test: shapes are checked while testing, and runs are repeatable on a small machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

from support import shapechecks

# This file must not import bnprobe: only what is imported after this line is checked.
install_import_hook("bnprobe.stats", f"{shapechecks.__name__}.checked")

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

"""What holds for every test: shapes are checked while testing, and runs are repeatable on a small machine."""

from __future__ import annotations

import gc
from collections.abc import Generator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings

from support import shapechecks

# This file must not import bnprobe: only what is imported after this line is checked.
jaxtyping.install_import_hook("bnprobe.stats", f"{shapechecks.__name__}.checked")

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("repeatable")


CHECKED = ("unit", "fuzz")
"""Tests of functions by themselves. Whole commands call them as these do, and checks take a seventh of their time."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while all tests are imported, and never look through what was: a million objects that stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check shapes or not, before the fixtures of the test are made."""
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    jaxtyping.config.update("jaxtyping_disable", folder not in CHECKED)


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

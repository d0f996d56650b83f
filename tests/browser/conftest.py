"""A headless Chromium, where one is installed, and pages in it that note what goes wrong."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bnprobe.report import RenderOptions, render
from browser.opened import WIDE, Open, Opened

sys.path.append(str(Path(__file__).parents[1] / "unit" / "report"))  # documents made up for the tests of reports

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """The browser."""
    driver = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make browser")
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        pytest.skip("Chromium is not installed: make browser, or apt-get install chromium")
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with driver.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=as_root)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the page of a document; after the test nothing must have gone wrong in any."""
    opened: list[Opened] = []

    def show(
        document: object, size: tuple[int, int] = WIDE, scheme: str = "light", scripts: bool = True, **options: Any
    ) -> Opened:
        path = tmp_path / f"page-{len(opened)}.html"
        path.write_text(render(document, "html", RenderOptions(**options)), encoding="utf-8")
        opened.append(Opened(browser, path, size, scheme, scripts))
        return opened[-1]

    yield show
    for each in opened:
        each.page.close()
        assert each.noted == []

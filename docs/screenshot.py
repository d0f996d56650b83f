"""The picture of a page in reading-a-report.md: ``python docs/screenshot.py`` writes docs/images/page.png.

It is the top of the page of ``bnprobe scan sample_configs/digits/sorted.yaml --format html`` in a headless Chromium
(``make browser``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

COMMAND = ("scan", "sample_configs/digits/sorted.yaml", "--format", "html", "--exit-zero", "--output")
PICTURE = Path(__file__).parent / "images" / "page.png"
SIZE = {"width": 1160, "height": 830}


def main() -> None:
    """Scan, open the page, and take its picture."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "report.html"
        subprocess.run([sys.executable, "-m", "bnprobe", *COMMAND, str(page)], check=True)
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        shown = browser.new_page(viewport=SIZE)
        shown.goto(page.as_uri())
        shown.wait_for_selector("html[data-charts=drawn]")
        shown.screenshot(path=str(PICTURE))
        browser.close()


if __name__ == "__main__":
    main()

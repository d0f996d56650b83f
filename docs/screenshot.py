"""The pictures of pages: ``python docs/screenshot.py`` writes those of ``PICTURES`` into docs/images.

Each is the top of a page that a command writes, in a headless Chromium (``make browser``). With names, these only:
``python docs/screenshot.py log.png``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parent / "images"
PICTURES = {  # the command, and width and height
    "page.png": ("scan sample_configs/digits/sorted.yaml --exit-zero", (1160, 830)),  # reading-a-report.md
    "log.png": ("show docs/examples/while_training.jsonl", (960, 1462)),  # while-training.md
}


def main(names: list[str]) -> None:
    """Write the pages, open them, and take their pictures."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        for name in names:
            command, (width, height) = PICTURES[name]
            page = Path(folder) / f"{name}.html"
            options = ["--format", "html", "--output", str(page)]
            subprocess.run([sys.executable, "-m", "bnprobe", *command.split(), *options], check=True)
            shown = browser.new_page(viewport={"width": width, "height": height})
            shown.goto(page.as_uri())
            shown.wait_for_selector("html[data-charts=drawn]")
            shown.screenshot(path=str(IMAGES / name))
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:] or list(PICTURES))

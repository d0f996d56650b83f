"""A page in the browser, which notes what goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

WIDE, NARROW = (1280, 900), (400, 800)
"""Sizes of windows."""


class Opened:
    """A page in the browser.

    Args:
        browser: The browser.
        path: The file.
        size: Of the window.
        scheme: Of colours, "light" or "dark".
        scripts: Whether the browser runs scripts.

    Attributes:
        page: Of Playwright.
        noted: Errors, warnings, dialogs and requests beyond the file.
    """

    def __init__(self, browser: Any, path: Path, size: tuple[int, int], scheme: str, scripts: bool) -> None:
        self.noted: list[str] = []
        width, height = size
        self.page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, java_script_enabled=scripts
        )
        self.page.set_default_timeout(10_000)
        self.page.on("console", lambda message: self.noted.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.noted.append(f"error: {error}"))
        self.page.on("dialog", self._dismiss)
        self.page.on("request", lambda request: self._request(request.url, path.as_uri()))
        self.page.goto(path.as_uri())
        if scripts and self.page.locator(".chart").count():
            self.page.wait_for_selector("html[data-charts=drawn]")

    def _dismiss(self, dialog: Any) -> None:
        self.noted.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, url: str, own: str) -> None:
        if url.partition("#")[0] != own and not url.startswith("data:"):
            self.noted.append(f"request: {url}")

    def columns(self, chart: str) -> Any:
        """What a pointer meets in a chart of the network, for each layer."""
        return self.page.locator(f"#{chart} svg .mark-rect.role-mark").last.locator("path")

    def tip_at(self, place: Any, **options: Any) -> str:
        """What the page says under a pointer at this place: its words, with one space between them."""
        place.scroll_into_view_if_needed()
        # The page hides what it says when it scrolls, and a browser tells it so a frame later.
        self.page.evaluate("() => new Promise((then) => requestAnimationFrame(() => requestAnimationFrame(then)))")
        place.hover(**options)
        tip = self.page.locator("#tip")
        tip.wait_for()
        return " ".join(tip.inner_text().split())

    def names(self, table: str = "#layers") -> list[str]:
        """The layers of the table, as they are shown, without their signs."""
        rows = self.page.locator(f"{table} .table.tools tbody tr:visible th")
        return [text.split("\n")[0].split(maxsplit=1)[1] for text in rows.all_inner_texts()]


Open = Callable[..., Opened]
"""Opens the page of a document."""

"""Documents as the terminal shows them."""

from __future__ import annotations

from typing import Any

from bnprobe.report import RenderOptions, render


def text_of(document: object, **options: Any) -> str:
    """The text, as it is printed; of what has a short form, the whole, unless ``verbose`` is given."""
    return render(document, "terminal", RenderOptions(**{"verbose": True, **options}))


def said(document: object, **options: Any) -> str:
    """The words, however they are wrapped."""
    return " ".join(text_of(document, **options).split())


def section(document: object, title: str, **options: Any) -> list[str]:
    """The lines of a part, from its heading to the next empty line."""
    lines = text_of(document, **options).split("\n")
    start = next((index for index, line in enumerate(lines) if line.startswith(title)), len(lines))
    return lines[start : next((index for index in range(start, len(lines)) if not lines[index]), len(lines))]

"""Pages of HTML as a browser parses them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any
from xml.etree.ElementTree import Element

import html5lib

from bnprobe.report import RenderOptions, render


class Page:
    """A page; parsing it fails where a browser would have to guess.

    Args:
        text: The file.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.root: Element = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(text)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        """The elements of a tag, with these attributes (``class_`` stands for class), in order."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [
            element
            for element in self.root.iter(tag)
            if all(value in element.get(name, "").split() for name, value in wanted.items())
        ]

    def by_id(self, name: str) -> Element:
        """The element of this id."""
        (found,) = (element for element in self.elements if element.get("id") == name)
        return found

    @cached_property
    def elements(self) -> list[Element]:
        """All elements."""
        return [element for element in self.root.iter() if isinstance(element.tag, str)]

    @property
    def sections(self) -> list[str]:
        """The ids of the sections, in order."""
        return [element.get("id", "") for element in self.all("section")]

    @cached_property
    def charts(self) -> dict[str, dict[str, Any]]:
        """The charts, by the id of their places."""
        return json.loads(said(self.by_id("charts"))) if self.all("script", id="charts") else {}

    @cached_property
    def data(self) -> dict[str, list[dict[str, Any]]]:
        """What charts draw: rows by name."""
        found = json.loads(said(self.by_id("data"))) if self.all("script", id="data") else {}
        return {name: [dict(zip(fields, row, strict=True)) for row in rows] for name, (fields, rows) in found.items()}

    def table(self, caption: str) -> list[dict[str, str]]:
        """The rows of the table whose caption begins so, by heading."""
        table = next(table for table in self.all("table") if said(table.find("caption")).startswith(caption))
        head, body = table.find("thead"), table.find("tbody")
        assert head is not None
        assert body is not None
        headings = [said(cell) for cell in head.iter("th")]
        return [dict(zip(headings, map(said, row), strict=True)) for row in body.iter("tr")]

    @property
    def words(self) -> str:
        """All text that is shown, in one line."""
        hidden = {id(inner) for element in self.all("script") + self.all("style") for inner in element.iter()}
        return " ".join("".join(_shown(self.root, hidden)).split())


def _shown(element: Element, hidden: set[int]) -> Iterator[str]:
    if id(element) in hidden or not isinstance(element.tag, str):
        return
    yield element.text or ""
    for child in element:
        yield from _shown(child, hidden)
        yield (child.tail or "") + ("" if child.tag in ("wbr", "span") else " ")


def said(element: Element | None) -> str:
    """The text of an element."""
    assert element is not None
    return " ".join("".join(element.itertext()).split())


def digest(text: str) -> str:
    """As a content security policy names a script or a style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def between(text: str, tag: str) -> list[str]:
    """What stands in the elements of a tag without attributes, as it is in the file."""
    return re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)


def page_of(document: object, **options: Any) -> Page:
    """The page of a document."""
    return Page(render(document, "html", RenderOptions(**options)))

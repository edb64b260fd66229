"""HTML pages as a browser reads them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from forge.report.page import plotly_code


def own_text(page: Path) -> str:
    """The page without the code that draws."""
    return page.read_text(encoding="utf-8").replace(plotly_code(), "")


class Elements(HTMLParser):
    """The elements of a page, as a browser finds them, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def figures(self) -> dict[str, Any]:
        """What the page tells plotly.js to draw, by the id of the element."""
        begin = "const specs = "
        (line,) = [line for text in self.text for line in text.splitlines() if line.startswith(begin)]
        found: dict[str, Any] = json.loads(line.removeprefix(begin).removesuffix(";"))
        return found

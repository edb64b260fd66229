"""HTML pages that load nothing: Jinja2 with escaping, plotly.js inline, and a script nonce in the page's policy.

A page may show text of a run folder from elsewhere. Jinja2 escapes it, also in the data of figures, and the content
security policy runs only scripts with the nonce, which is drawn when the page is written.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from forge.errors import harmless, printable
from forge.report.text import number
from forge.report.trial_rows import shown
from forge.units import format_duration

STATUS_COLORS = {
    "finished": "#2f6bd8",
    "stopped": "#c08a1e",
    "diverged": "#8a4fbf",
    "failed": "#cf3e3e",
    "died": "#cf3e3e",
    "running": "#1d9a6c",
    "waiting": "#8b95a3",
}
_MAX_LABEL_CHARS = 28


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFigure:
    """One figure with its heading; without a specification if there is nothing to draw yet."""

    key: str
    """Id of its element."""
    title: str
    note: str
    spec: Mapping[str, Any] | None
    """`data` and `layout` of plotly.js."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTile:
    """One number at the top of a page."""

    name: str
    value: str
    note: str


def render_page(
    template: str,
    *,
    figures: Sequence[PageFigure],
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> str:
    """Render a template of this folder; all text in `values` is escaped."""
    environment = page_environment()
    environment.filters |= filters or {}
    drawn = {figure.key: figure.spec for figure in figures if figure.spec}
    return environment.get_template(template).render(
        colors=STATUS_COLORS,
        nonce=secrets.token_urlsafe(16),
        figures=figures,
        specs=drawn,
        plotly=plotly_code() if drawn else "",
        written_at=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        **values,
    )


def page_environment(*folders: Path) -> Environment:
    """Return the environment of templates in this folder and others, which escapes every text."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader([Path(__file__).parent, *folders]),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            value if isinstance(value, Markup) else harmless(str(value))
        ),  # Markup: plotly's code
    )
    environment.filters |= {"shown": shown, "number": number, "duration": duration}
    return environment


def plotly_code() -> str:
    """The whole of plotly.js, so that the page loads nothing."""
    code: str = get_plotlyjs()
    return code


def label(text: str, *, limit: int = _MAX_LABEL_CHARS) -> str:
    """Shorten a text and escape what plotly would read as markup."""
    return escape(printable(text, limit=limit), quote=False)


def duration(seconds: float | None) -> str:
    """Format a duration; `-` if it is unknown."""
    return format_duration(math.nan if seconds is None else seconds)

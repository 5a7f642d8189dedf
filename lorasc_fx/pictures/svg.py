"""Accessible SVG pictures, with text as text, a title and a description.

A chart is a matplotlib figure in a page. Its colours are CSS variables, which the page defines for light and dark mode.
A drawing is a separate file made of elements, with plain colours that every viewer knows. Ids have a prefix, so that a
page can hold several pictures.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from lorasc_fx.util.extras import module_of

library = partial(module_of, "report")
"""Import a module of the extra `report`. Raises MissingExtra with the pip command."""

INK, MUTED, PAPER = "#1f2430", "#68707f", "#fdfdfc"
SERIES = ("#0969b3", "#b5480b", "#16784a", "#7a3fa8", "#8a6a00", "#b0255f", "#00727d", "#5b5f66")
"""Colours of series in order; each has a contrast of 4.5 or more on PAPER (WCAG 2.1, AA)."""

_VARIABLES = {INK: "ink", MUTED: "muted", PAPER: "paper"}
_VARIABLES |= {colour: f"series-{number}" for number, colour in enumerate(SERIES, 1)}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lorasc-fx",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Picture:
    """An SVG element with its title and a description in words."""

    svg: str
    title: str
    description: str


@contextmanager
def figure(width: float, height: float) -> Iterator[Any]:
    """Yield a matplotlib figure of this size in points, with our settings."""
    matplotlib, figures = library("matplotlib"), library("matplotlib.figure")
    with matplotlib.rc_context(_SETTINGS):
        yield figures.Figure(figsize=(width / 72, height / 72), layout="none")


def finished(drawn: Any, key: str, title: str, description: str) -> Picture:
    """Return a figure as a picture in a page.

    Args:
        drawn: a matplotlib figure.
        key: prefix of the ids: letters, digits and dashes.
        title: a few words, the accessible name.
        description: of what the picture shows.
    """
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name}, {colour})")
    return named(svg, key, title, description)


def element(tag: str, attributes: Mapping[str, Any], content: str = "") -> str:
    """Return an element of SVG; numbers are lengths in points."""
    texts = {name: value if isinstance(value, str) else f"{value:.5g}" for name, value in attributes.items()}
    inside = " ".join(f'{name}="{html.escape(text)}"' for name, text in texts.items())
    return f"<{tag} {inside}>{html.escape(content)}</{tag}>"


def named(svg: str, key: str, title: str, description: str) -> Picture:
    """Return an SVG element as a picture with a title and a description; see `finished`."""
    texts = (
        f'<title id="{key}-title">{html.escape(title)}</title><desc id="{key}-desc">{html.escape(description)}</desc>'
    )
    head = f'<svg role="img" aria-labelledby="{key}-title {key}-desc" '
    return Picture(
        re.sub(r"<svg ([^>]*)>", lambda match: f"{head}{match[1]}>{texts}", svg, count=1), title, description
    )

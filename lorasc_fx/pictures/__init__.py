"""SVG pictures: rewritten graphs around sites (placed by igraph), charts of a report (matplotlib), notebook HTML."""

from lorasc_fx.pictures.graph import draw_graphs
from lorasc_fx.pictures.notebook import cascade_html
from lorasc_fx.pictures.svg import Picture

__all__ = ["Picture", "cascade_html", "draw_graphs"]

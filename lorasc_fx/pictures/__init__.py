"""Pictures as SVG: rewritten graphs around sites, and the charts of a report. Drawn by matplotlib, placed by igraph."""

from lorasc_fx.pictures.graph import draw_graphs
from lorasc_fx.pictures.svg import Picture

__all__ = ["Picture", "draw_graphs"]

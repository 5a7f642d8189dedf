"""Pictures as SVG: rewritten graphs around sites (placed by igraph), and the charts of a report (drawn by matplotlib).

What a notebook shows of a cascade needs neither.
"""

from lorasc_fx.pictures.graph import draw_graphs
from lorasc_fx.pictures.notebook import cascade_html
from lorasc_fx.pictures.svg import Picture

__all__ = ["Picture", "cascade_html", "draw_graphs"]

"""Pictures as SVG: rewritten graphs around sites, and the charts of a report. Drawn by matplotlib, placed by igraph.

What a notebook shows of a cascade needs neither.
"""

from lorasc_fx.pictures.graph import draw_graphs
from lorasc_fx.pictures.notebook import cascade_html
from lorasc_fx.pictures.svg import Picture

__all__ = ["Picture", "cascade_html", "draw_graphs"]

"""The libraries that draw, imported when something is drawn."""

from __future__ import annotations

from functools import partial

from lorasc_fx.extras import module_of

__all__ = ["library"]

library = partial(module_of, "report")
"""Import a module of the extra `report`; raises MissingExtra with the pip command."""

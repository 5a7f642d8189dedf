"""The libraries that draw, imported when something is drawn."""

from __future__ import annotations

import importlib
from typing import Any

from lorasc_fx.errors import MissingExtra

__all__ = ["library"]


def library(name: str) -> Any:
    """Import a module of the extra `report`.

    Raises:
        MissingExtra: it is not installed; the message holds the pip command.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)  # noqa: TID251 - names of ours
    except ModuleNotFoundError as fault:
        if fault.name is None or fault.name.partition(".")[0] != package:
            raise  # it is there, and something that it needs itself is not
        raise MissingExtra(
            f"pictures need the package {package!r}, which is not installed: pip install 'lorasc-fx[report]'"
        ) from fault

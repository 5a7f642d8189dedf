"""The command `lorasc-fx`: train, sites, fold, compare."""

from __future__ import annotations

from lorasc_fx.cli.app import main

__all__ = ["main"]

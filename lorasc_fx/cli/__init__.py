"""The command `lorasc-fx`: train, sites, fold, export, compare, report."""

from __future__ import annotations

from lorasc_fx.cli.app import main

__all__ = ["main"]

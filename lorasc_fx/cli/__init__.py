"""The command `lorasc-fx`, and `load`, which loads the cascade of a run folder in Python."""

from lorasc_fx.cli.app import load, main

__all__ = ["load", "main"]

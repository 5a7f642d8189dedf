"""Optional packages: found when they are needed, and one sentence with the pip command when they are not there."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from lorasc_fx.errors import MissingExtra


def module_of(extra: str, name: str) -> Any:
    """Import a module of an extra.

    Raises:
        MissingExtra: the module is not installed.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)  # noqa: TID251 - names of packages in our own sources
    except ModuleNotFoundError as fault:
        if fault.name is None or fault.name.partition(".")[0] != package:
            raise  # it is there, and something that it needs itself is not: not ours to explain away
        raise missing(extra, package) from fault


def missing(extra: str, package: str) -> MissingExtra:
    """Return the error that names the pip command."""
    return MissingExtra(f"this needs the package {package!r}, which is not installed: pip install 'lorasc-fx[{extra}]'")


def require(extra: str, *names: str) -> None:
    """Check that the modules of an extra can be imported; see `module_of`."""
    for name in names:
        module_of(extra, name)

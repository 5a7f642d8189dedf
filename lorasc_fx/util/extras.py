"""Imports on first use: of optional packages, with the pip command if one is missing, and of modules of our own."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lorasc_fx.errors import MissingExtra, nearest


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


def lazy_modules(package: str, modules: tuple[str, ...]) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package that imports its own modules when they are first used."""

    def import_on_use(name: str) -> ModuleType:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")  # noqa: TID251 - one of our own, listed by the package
        raise AttributeError(f"module {package!r} has no attribute {name!r}{nearest(name, modules)}")

    return import_on_use, lambda: sorted({*vars(sys.modules[package]), *modules})

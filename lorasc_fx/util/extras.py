"""Lazy imports of optional packages, with the pip command if one is missing, and of our own modules."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from lorasc_fx.errors import MissingExtra, nearest


def module_of(extra: str, name: str) -> Any:
    """Import a module of an optional package.

    Args:
        extra: name of the extra in pyproject.toml that installs the package.
        name: name of the module.

    Raises:
        MissingExtra: the package is not installed.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)  # noqa: TID251 - names of packages in our own sources
    except ModuleNotFoundError as fault:
        if fault.name is None or fault.name.partition(".")[0] != package:
            raise  # the package is installed, but one of its own dependencies is missing
        raise missing(extra, package) from fault


def missing(extra: str, package: str) -> MissingExtra:
    """Return the error with the pip command."""
    return MissingExtra(f"this needs the package {package!r}, which is not installed: pip install 'lorasc-fx[{extra}]'")


def require(extra: str, *names: str) -> None:
    """Check that the modules of an extra can be imported. Raises like `module_of`."""
    for name in names:
        module_of(extra, name)


def lazy_modules(package: str, modules: tuple[str, ...]) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package that imports its submodules on first use."""

    def import_on_use(name: str) -> ModuleType:
        if name in modules:
            return importlib.import_module(f"{package}.{name}")  # noqa: TID251 - one of our own modules
        raise AttributeError(f"module {package!r} has no attribute {name!r}{nearest(name, modules)}")

    return import_on_use, lambda: sorted({*vars(sys.modules[package]), *modules})

"""The versions under which a checkpoint was written: the same bits are promised under the same ones."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from typing import Any

import torch

__all__ = ["differences", "versions"]


def versions() -> dict[str, str]:
    """Return the versions of torch, of this package and of python."""
    return {"torch": str(torch.__version__), "lorasc-fx": _own(), "python": platform.python_version()}


def differences(saved: Any) -> list[str]:
    """Return what is another version now, as `torch 2.13.0, here 2.14.0`; what was not written down is not compared."""
    if not isinstance(saved, dict):
        return []
    return [
        f"{name} {saved[name]}, here {now}" for name, now in versions().items() if name in saved and saved[name] != now
    ]


@functools.cache
def _own() -> str:
    try:
        return importlib.metadata.version("lorasc-fx")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"

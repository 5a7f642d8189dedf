"""Other people's training loops and devices; each part is imported when it is first asked for."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = (
    "distributed",
    "fsdp",
    "tensor_parallel",
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")  # noqa: TID251 - a name of the tuple above

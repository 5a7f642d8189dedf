"""Cascades on several processes: `fsdp` shards one (FSDP2), `dcp` gives its state to torch.distributed.checkpoint."""

import importlib
from typing import Any

from lorasc_fx.errors import nearest

__all__ = ["dcp", "fsdp"]

_MODULES = ("dcp", "fsdp")


def __getattr__(name: str) -> Any:
    """Import a module when it is first asked for."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")  # noqa: TID251 - one of our own, listed above
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{nearest(name, _MODULES)}")


def __dir__() -> list[str]:
    """Return the names of the modules, too."""
    return sorted({*globals(), *_MODULES})

"""Other people's training loops: a module each, imported when it is asked for, with what it is about.

`transformers` and `lightning` hold a `CascadeCallback`, for their Trainers; `progress` holds `track`, for a loop of
your own: bars, metrics and TensorBoard.
"""

import importlib
from typing import Any

from lorasc_fx.errors import nearest

__all__ = ["progress", "transformers"]

_MODULES = (
    "lightning",
    "progress",
    "transformers",
)


def __getattr__(name: str) -> Any:
    """Import a module when it is first asked for."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")  # noqa: TID251 - one of our own, listed above
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{nearest(name, _MODULES)}")


def __dir__() -> list[str]:
    """Return the names of the modules, too."""
    return sorted({*globals(), *_MODULES})

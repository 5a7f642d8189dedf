"""Other people's training loops: a module each, imported when it is asked for, with the package that it is about.

`transformers` holds `CascadeCallback`, for the Trainer; `accelerate` holds `keep`, for `save_state` and `load_state`;
`progress` holds `telling`, for a loop of your own: bars, metrics and TensorBoard.
"""

import importlib
from typing import Any

__all__ = ["accelerate", "progress", "transformers"]

_MODULES = (
    "accelerate",
    "progress",
    "transformers",
)


def __getattr__(name: str) -> Any:
    """Import a module when it is first asked for."""
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")  # noqa: TID251 - one of our own, listed above
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the names of the modules, too."""
    return sorted({*globals(), *_MODULES})

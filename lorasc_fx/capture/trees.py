"""Trees of other libraries that torch has to know before it can take them apart: key-value caches."""

from __future__ import annotations

import importlib
import sys

__all__ = ["know_trees"]


def know_trees() -> None:
    """Let transformers, where it is in use, register its cache with torch's pytree, as it does for its own exports."""
    if "transformers.cache_utils" in sys.modules:
        own = importlib.import_module("transformers.integrations.executorch")
        register = getattr(own, "register_dynamic_cache_export_support", None)
        if register is not None:
            register()

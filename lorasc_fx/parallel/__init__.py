"""Cascades whose weights are sharded over several processes (FSDP2)."""

from lorasc_fx.util.environment import lazy_modules

__all__ = ["fsdp"]

__getattr__, __dir__ = lazy_modules(__name__, ("fsdp",))

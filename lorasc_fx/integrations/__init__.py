"""The callback for transformers' Trainer, `transformers.CascadeCallback`. It is imported lazily, with its library."""

from lorasc_fx.util.environment import lazy_modules

__all__ = ["transformers"]

__getattr__, __dir__ = lazy_modules(__name__, ("transformers",))

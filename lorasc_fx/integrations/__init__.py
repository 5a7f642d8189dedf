"""Callbacks for the trainers of other libraries: `transformers.CascadeCallback` and `lightning.CascadeCallback`.

The two modules are imported lazily, because each one imports its library.
"""

from lorasc_fx.util.environment import lazy_modules

__all__ = ["transformers"]

__getattr__, __dir__ = lazy_modules(__name__, ("lightning", "transformers"))

"""Training loops of other libraries: `transformers` and `lightning` hold a `CascadeCallback` for their Trainers.

Each module imports its library, and is imported when it is first used.
"""

from lorasc_fx.util.extras import lazy_modules

__all__ = ["transformers"]

__getattr__, __dir__ = lazy_modules(__name__, ("lightning", "transformers"))

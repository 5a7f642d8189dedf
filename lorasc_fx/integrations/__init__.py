"""Training loops of other libraries. Each module imports its library, and is imported when it is first used.

`transformers` and `lightning` hold a `CascadeCallback` for their Trainers. `progress` holds `track`, for your own loop:
bars, metrics and TensorBoard.
"""

from lorasc_fx.util.extras import lazy_modules

__all__ = ["progress", "transformers"]

__getattr__, __dir__ = lazy_modules(__name__, ("lightning", "progress", "transformers"))

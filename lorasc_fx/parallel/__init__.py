"""Cascades on several processes: `fsdp` shards one (FSDP2), `dcp` gives its state to torch.distributed.checkpoint."""

from lorasc_fx.util.extras import lazy_modules

__all__ = ["dcp", "fsdp"]

__getattr__, __dir__ = lazy_modules(__name__, ("dcp", "fsdp"))

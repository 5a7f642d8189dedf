"""Cascades on several processes: `fsdp` shards a cascade (FSDP2), `dcp` is for torch.distributed.checkpoint."""

from lorasc_fx.util.environment import lazy_modules

__all__ = ["dcp", "fsdp"]

__getattr__, __dir__ = lazy_modules(__name__, ("dcp", "fsdp"))

"""Out: a cascade in other people's formats."""

from lorasc_fx.export.peft import PeftAdapter, peft

__all__ = ["PeftAdapter", "peft"]

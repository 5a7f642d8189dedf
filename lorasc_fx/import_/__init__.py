"""In: other people's adapters as the first experts of a cascade."""

from lorasc_fx.import_.peft import peft, peft_spec

__all__ = ["peft", "peft_spec"]

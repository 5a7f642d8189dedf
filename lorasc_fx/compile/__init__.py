"""Adapted graphs: capture a call and insert branches, cache the result by signature, fold it and draw it."""

from lorasc_fx.capture import Axis
from lorasc_fx.compile.compiler import Compiler
from lorasc_fx.compile.variants import NewVariant, Variant, Variants
from lorasc_fx.signature import Call

__all__ = ["Axis", "Call", "Compiler", "NewVariant", "Variant", "Variants"]

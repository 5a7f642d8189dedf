"""Adapted graphs: made for a call (capture, match, insert), kept by signature, folded and drawn."""

from lorasc_fx.capture import Axis
from lorasc_fx.compile.compiler import Compiler
from lorasc_fx.compile.variants import Growable, Made, Variant, Variants
from lorasc_fx.pictures import Picture
from lorasc_fx.signature import Call

__all__ = ["Axis", "Call", "Compiler", "Growable", "Made", "Picture", "Variant", "Variants"]

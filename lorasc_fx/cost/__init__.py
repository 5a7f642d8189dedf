"""What branches cost: rates of this machine, seconds by shapes, the cheapest placement, the expected step ratio."""

from lorasc_fx.cost.measure import rates_of
from lorasc_fx.cost.model import ConvUse, Line, LinearUse, Rates, beside, merged
from lorasc_fx.cost.placement import Cheapest, Expectation, expect

__all__ = [
    "Cheapest",
    "ConvUse",
    "Expectation",
    "Line",
    "LinearUse",
    "Rates",
    "beside",
    "expect",
    "merged",
    "rates_of",
]

"""What branches cost: rates of this machine, seconds by shapes, the cheapest placement, the expected step ratio."""

from lorasc_fx.cost.expectation import Expectation, expect
from lorasc_fx.cost.model import ConvUse, LinearUse, beside, merged, shared_gain
from lorasc_fx.cost.placer import Cheapest
from lorasc_fx.cost.rates import Line, Rates
from lorasc_fx.cost.store import rates_of

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
    "shared_gain",
]

"""The slow state of weights as values, and what the start and the end of a stage make of it. No graph in here."""

from lorasc_fx.state.engine import (
    Learner,
    all_finite,
    begin_stage,
    check_finite,
    delta_of,
    end_stage,
    has_trained,
    start_weight,
    sums_are_finite,
)
from lorasc_fx.state.model import Part, SlowWeights
from lorasc_fx.state.products import Scratch, arithmetic, summing
from lorasc_fx.state.weight import (
    Expert,
    KeptNoise,
    Memory,
    View,
    ViewName,
    WeightState,
    host,
    keep_base,
    scaled,
    sum_of,
    svd_of,
    truncated,
)

__all__ = [
    "Expert",
    "KeptNoise",
    "Learner",
    "Memory",
    "Part",
    "Scratch",
    "SlowWeights",
    "View",
    "ViewName",
    "WeightState",
    "all_finite",
    "arithmetic",
    "begin_stage",
    "check_finite",
    "delta_of",
    "end_stage",
    "has_trained",
    "host",
    "keep_base",
    "scaled",
    "start_weight",
    "sum_of",
    "summing",
    "sums_are_finite",
    "svd_of",
    "truncated",
]

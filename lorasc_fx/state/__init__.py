"""The slow state of weights as immutable values, and the functions that start and end a stage. Knows no graphs."""

from lorasc_fx.branch.grid import arithmetic
from lorasc_fx.state.fold import Scratch, scaled, sum_of, summing, svd_of, truncated
from lorasc_fx.state.kept import Kept, kept_by, loss_of, sample
from lorasc_fx.state.stage import (
    BaseMemory,
    Learner,
    Part,
    SlowWeights,
    begin_stage,
    check_finite,
    delta_of,
    has_trained,
    host,
    start_weight,
    sums_are_finite,
)
from lorasc_fx.state.weight import Expert, History, KeptNoise, StageEnd, Summed, ViewName, WeightState

__all__ = [
    "BaseMemory",
    "Expert",
    "History",
    "Kept",
    "KeptNoise",
    "Learner",
    "Part",
    "Scratch",
    "SlowWeights",
    "StageEnd",
    "Summed",
    "ViewName",
    "WeightState",
    "arithmetic",
    "begin_stage",
    "check_finite",
    "delta_of",
    "has_trained",
    "host",
    "kept_by",
    "loss_of",
    "sample",
    "scaled",
    "start_weight",
    "sum_of",
    "summing",
    "sums_are_finite",
    "svd_of",
    "truncated",
]

"""The slow state of weights as values, and what the start and the end of a stage make of it. No graph in here."""

from lorasc_fx.state.engine import (
    began_of,
    began_shapes,
    begin_stage,
    check_finite,
    end_stage,
    factors_of,
    gain_of,
    has_trained,
    start_differs,
    start_weight,
)
from lorasc_fx.state.kept import Began, Expert, Factors, KeptNoise, Past
from lorasc_fx.state.products import arithmetic, summing
from lorasc_fx.state.slow import SlowWeight, Which
from lorasc_fx.state.slow_faults import slow_faults
from lorasc_fx.state.spectrum import effective_rank, norm_of, singular_values, slow_spectrum
from lorasc_fx.state.turns import Turn, scaled

__all__ = [
    "Began",
    "Expert",
    "Factors",
    "KeptNoise",
    "Past",
    "SlowWeight",
    "Turn",
    "Which",
    "arithmetic",
    "began_of",
    "began_shapes",
    "begin_stage",
    "check_finite",
    "effective_rank",
    "end_stage",
    "factors_of",
    "gain_of",
    "has_trained",
    "norm_of",
    "scaled",
    "singular_values",
    "slow_faults",
    "slow_spectrum",
    "start_differs",
    "start_weight",
    "summing",
]

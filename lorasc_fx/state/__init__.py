"""The slow state of weights as values, and what the start and the end of a stage make of it. No graph in here."""

from lorasc_fx.state.engine import (
    all_finite,
    begin_stage,
    check_finite,
    end_stage,
    factors_of,
    gain_of,
    has_trained,
    start_weight,
)
from lorasc_fx.state.model import Part, SlowWeights, Trained
from lorasc_fx.state.products import arithmetic, summing
from lorasc_fx.state.spectrum import effective_rank, norm_of, singular_values, slow_spectrum
from lorasc_fx.state.weight import (
    Expert,
    Factors,
    InitialFactors,
    KeptNoise,
    Side,
    Tree,
    View,
    WeightState,
    Which,
    scaled,
    sum_of,
    svd_of,
    truncated,
)

__all__ = [
    "Expert",
    "Factors",
    "InitialFactors",
    "KeptNoise",
    "Part",
    "Side",
    "SlowWeights",
    "Trained",
    "Tree",
    "View",
    "WeightState",
    "Which",
    "all_finite",
    "arithmetic",
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
    "slow_spectrum",
    "start_weight",
    "sum_of",
    "summing",
    "svd_of",
    "truncated",
]

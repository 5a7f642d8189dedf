"""Tensor maths as modules and values: branches, their start, noise, and the slow state. No graph in here."""

from lorasc_fx.branch.branch import Branch, fill_factor
from lorasc_fx.branch.conv import ConvBranch
from lorasc_fx.branch.matrix import MatrixBranch
from lorasc_fx.branch.noise import amplitude, draw
from lorasc_fx.branch.quantized import dense, is_quantized
from lorasc_fx.branch.shared import shared_down
from lorasc_fx.branch.slow import Expert, Factors, KeptNoise, Past, SlowWeight, Which, arithmetic, summing
from lorasc_fx.branch.spectrum import effective_rank, norm_of, singular_values, slow_spectrum
from lorasc_fx.branch.stage import check_finite, end_stage, factors_of, start_differs, start_weight

__all__ = [
    "Branch",
    "ConvBranch",
    "Expert",
    "Factors",
    "KeptNoise",
    "MatrixBranch",
    "Past",
    "SlowWeight",
    "Which",
    "amplitude",
    "arithmetic",
    "check_finite",
    "dense",
    "draw",
    "effective_rank",
    "end_stage",
    "factors_of",
    "fill_factor",
    "is_quantized",
    "norm_of",
    "shared_down",
    "singular_values",
    "slow_spectrum",
    "start_differs",
    "start_weight",
    "summing",
]

"""Tensor maths as modules and values: branches, their start, noise, and the slow state. No graph in here."""

from lorasc_fx.branch.began import began_of, began_shapes, factors_of, has_trained
from lorasc_fx.branch.branch import Branch, fill_factor
from lorasc_fx.branch.conv import ConvBranch
from lorasc_fx.branch.dora import DoraBranch
from lorasc_fx.branch.kept import Began, Expert, Factors, KeptNoise, Past
from lorasc_fx.branch.matrix import MatrixBranch
from lorasc_fx.branch.noise import amplitude, draw
from lorasc_fx.branch.quantized import dense, is_quantized
from lorasc_fx.branch.shared import shared_down
from lorasc_fx.branch.slow import SlowWeight, Which
from lorasc_fx.branch.slow_faults import slow_faults
from lorasc_fx.branch.spectrum import effective_rank, norm_of, singular_values, slow_spectrum
from lorasc_fx.branch.stage import begin_stage, check_finite, end_stage, gain_of, start_differs, start_weight
from lorasc_fx.branch.sums import arithmetic, summing
from lorasc_fx.branch.turns import Turn, scaled

__all__ = [
    "Began",
    "Branch",
    "ConvBranch",
    "DoraBranch",
    "Expert",
    "Factors",
    "KeptNoise",
    "MatrixBranch",
    "Past",
    "SlowWeight",
    "Turn",
    "Which",
    "amplitude",
    "arithmetic",
    "began_of",
    "began_shapes",
    "begin_stage",
    "check_finite",
    "dense",
    "draw",
    "effective_rank",
    "end_stage",
    "factors_of",
    "fill_factor",
    "gain_of",
    "has_trained",
    "is_quantized",
    "norm_of",
    "scaled",
    "shared_down",
    "singular_values",
    "slow_faults",
    "slow_spectrum",
    "start_differs",
    "start_weight",
    "summing",
]

"""Tensor maths as modules: the trainable branches, their noise and their weights as stored. No graph in here."""

from lorasc_fx.branch.branch import Branch, fill_factor
from lorasc_fx.branch.conv import ConvBranch
from lorasc_fx.branch.dora import DoraBranch
from lorasc_fx.branch.matrix import MatrixBranch
from lorasc_fx.branch.noise import amplitude, draw
from lorasc_fx.branch.quantized import dense, is_quantized
from lorasc_fx.branch.shared import shared_down

__all__ = [
    "Branch",
    "ConvBranch",
    "DoraBranch",
    "MatrixBranch",
    "amplitude",
    "dense",
    "draw",
    "fill_factor",
    "is_quantized",
    "shared_down",
]

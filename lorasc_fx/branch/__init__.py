"""Tensor maths as modules: the trainable branches, their noise and their weights as stored. No graph in here."""

from lorasc_fx.branch.base import Branch, Decided, fill_factor, fresh_a
from lorasc_fx.branch.conv import ConvBranch
from lorasc_fx.branch.dora import BRANCH_OF, DoraBranch, branch_class
from lorasc_fx.branch.functions import shared_down
from lorasc_fx.branch.linear import MatrixBranch
from lorasc_fx.branch.noise import amplitude, draw, generator

__all__ = [
    "BRANCH_OF",
    "Branch",
    "ConvBranch",
    "Decided",
    "DoraBranch",
    "MatrixBranch",
    "amplitude",
    "branch_class",
    "draw",
    "fill_factor",
    "fresh_a",
    "generator",
    "shared_down",
]

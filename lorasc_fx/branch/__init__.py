"""Branches: trainable modules that adapt one weight each, with their deltas and the noise. Independent of graphs."""

from lorasc_fx.branch.contract import Branch, Decided, StartWeight, fill
from lorasc_fx.branch.factors import Delta, Factors, InitialFactors, Side, Tree
from lorasc_fx.branch.functions import shared_down
from lorasc_fx.branch.lora import LowRankBranch, ops_of
from lorasc_fx.branch.methods import METHODS, register_branch
from lorasc_fx.branch.noise import amplitude, draw, generator

__all__ = [
    "METHODS",
    "Branch",
    "Decided",
    "Delta",
    "Factors",
    "InitialFactors",
    "LowRankBranch",
    "Side",
    "StartWeight",
    "Tree",
    "amplitude",
    "draw",
    "fill",
    "generator",
    "ops_of",
    "register_branch",
    "shared_down",
]

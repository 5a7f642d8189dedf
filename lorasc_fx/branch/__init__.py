"""Branches: trainable modules that adapt one weight each. Also deltas of weights, and noise. Uses no graphs."""

from lorasc_fx.branch.contract import (
    Branch,
    Decided,
    Declared,
    StartWeight,
    fill,
    generator,
)
from lorasc_fx.branch.deltas import Delta, Factors, InitialFactors, Side, Tree
from lorasc_fx.branch.lora import LowRankBranch, ops_of
from lorasc_fx.branch.methods import BUILT_IN, METHODS, check_registered, register_branch
from lorasc_fx.branch.noise import amplitude, draw
from lorasc_fx.branch.placements import Placement

__all__ = [
    "BUILT_IN",
    "METHODS",
    "Branch",
    "Decided",
    "Declared",
    "Delta",
    "Factors",
    "InitialFactors",
    "LowRankBranch",
    "Placement",
    "Side",
    "StartWeight",
    "Tree",
    "amplitude",
    "check_registered",
    "draw",
    "fill",
    "generator",
    "ops_of",
    "register_branch",
]

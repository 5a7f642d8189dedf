"""Randomness with an address: a generator for (seed, stage, purpose, weight name), and for nothing else.

Algorithm.md, "Facts that hold exactly": the noise of a site does not depend on the order or number of sites, on the
number of processes, or on how often it is asked for. No global generator is read or advanced.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator"]


def generator(seed: int, stage: int, purpose: str, weight: str) -> torch.Generator:
    """Return a new CPU generator whose stream is a function of the four arguments alone."""
    digest = hashlib.sha256(f"{seed}\0{stage}\0{purpose}\0{weight}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))

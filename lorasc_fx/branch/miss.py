"""MiSS (2409.15371): one trained matrix D [rank, out], whose rows the inputs share: `delta[o, i] = D[i mod r, o]`.

Inputs are grouped in blocks of `rank` and summed before the product, so the delta has rank r at most, with a fixed A of
zeros and ones. D starts at zero. Source: MiSS, "balance"; peft's `MissModel`. There is no scale.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from lorasc_fx.branch.lora import LowRankBranch
from lorasc_fx.plan import Site


class MissBranch(LowRankBranch):
    """MiSS.

    Attributes:
        miss_block: D [rank, out].
    """

    miss_block: nn.Parameter
    kinds = frozenset({"linear", "conv", "embedding", "recurrent"})
    zeros: ClassVar[tuple[str, ...]] = ("miss_block",)

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        self.columns = site.matrix_shape[1]

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shape of D."""
        return {"miss_block": (site.rank, site.matrix_shape[0])}

    @classmethod
    def fault(cls, site: Site) -> str:
        """Return what is wrong with a rank above the number of inputs: the other rows of D would have no input."""
        rank, inputs = max(site.rank, *site.options.ranks, 0), site.matrix_shape[1]
        if rank <= inputs:
            return ""
        unused = rank - inputs
        return f"has {inputs} inputs, so {unused} rows of a rank of {rank} would have none. Give a rank up to {inputs}"

    @property
    def down(self) -> torch.Tensor:
        """A [rank, in]: 1 where the input belongs to the row of D, else 0."""
        rows = torch.arange(self.rank, device=self.miss_block.device)
        inputs = torch.arange(self.columns, device=self.miss_block.device) % self.rank
        return (rows.unsqueeze(1) == inputs).to(self.miss_block.dtype)

    @property
    def up(self) -> torch.Tensor:
        """D^T [out, rank]."""
        return self.miss_block.t()

    @property
    def rank(self) -> int:
        """Number of rows of D."""
        return self.miss_block.shape[0]

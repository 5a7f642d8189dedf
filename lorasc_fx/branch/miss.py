"""MiSS (2409.15371): one trained matrix D [rank, out] that blocks of inputs share: `delta[o, i] = D[i mod r, o]`.

The product sums the blocks of `rank` inputs and multiplies the sum by D. So the delta is a low-rank product with a
fixed A of zeros and ones. D starts at zero. The scale is 1. Source: MiSS, "balance"; `MissModel` of peft.
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
        """Return why a rank larger than the number of inputs is refused, or "". Some rows of D would have no input."""
        rank, inputs = max(site.rank, *site.options.ranks, 0), site.matrix_shape[1]
        if rank <= inputs:
            return ""
        unused = rank - inputs
        return f"has {inputs} inputs, so rank {rank} would leave {unused} rows unused. Give a rank of at most {inputs}"

    @property
    def down(self) -> torch.Tensor:
        """A [rank, in]: 1 if the input uses this row of D, otherwise 0."""
        rows = torch.arange(self.rank, device=self.miss_block.device)
        inputs = torch.arange(self.columns, device=self.miss_block.device) % self.rank
        return (rows.unsqueeze(1) == inputs).to(self.miss_block.dtype)

    @property
    def up(self) -> torch.Tensor:
        """D^T [out, rank]."""
        return self.miss_block.t()

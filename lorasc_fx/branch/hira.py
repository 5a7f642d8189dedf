"""HiRA (Huang et al., ICLR 2025): `delta = W * (B A)`, an elementwise product with the weight, which has a high rank.

W is the weight at the start of the stage. A starts at random values and B at zero, as in LoRA. The scale is 1. Source:
HiRA, equation 3; `HiraModel` of peft.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from lorasc_fx.branch.contract import Branch
from lorasc_fx.branch.lora import random_factor
from lorasc_fx.plan import Site


class HiraBranch(Branch):
    """HiRA. Computes the adapted weight.

    Attributes:
        hira_A: A [rank, in].
        hira_B: B [out, rank].
    """

    hira_A: nn.Parameter
    hira_B: nn.Parameter
    kinds = frozenset({"linear", "conv", "embedding", "recurrent"})
    zeros: ClassVar[tuple[str, ...]] = ("hira_B",)
    pads_with_zeros = True
    uses_weight = True

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A and B."""
        a, b = site.factor_shapes
        return {"hira_A": a, "hira_B": b}

    @classmethod
    def initial_values(cls, site: Site, seed: int, stage: int) -> dict[str, torch.Tensor]:
        """Return a random A, and zeros for B."""
        values = super().initial_values(site, seed, stage)
        return {**values, "hira_A": random_factor(seed, stage, "hira_A", site.weight, site.factor_shapes[0])}

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return `W * (B A)` in the shape of the weight."""
        assert weight is not None
        product = self.hira_B @ self.hira_A
        return weight * (product.t() if self.transposed else product).reshape(weight.shape).to(weight.dtype)

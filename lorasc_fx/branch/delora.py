"""DeLoRA (2503.18225): a sum of normalized rank-1 terms, so that the norm of the delta is bounded.

`delta = B diag(lambda / (r |a_i| |b_i|)) A diag(w)` with rows a_i of A, columns b_i of B, and the column norms w [in]
of the weight at the start of the stage. A starts at random values, B at zero, and lambda at the option `bound`. The
scale is 1. Source: DeLoRA, equation 8; `DeloraModel` of peft.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
from torch import nn

from lorasc_fx.branch.contract import StartWeight
from lorasc_fx.branch.lora import LowRankBranch, random_factor
from lorasc_fx.plan import Site
from lorasc_fx.spec import CascadeSpec
from lorasc_fx.util.decode import Check

MIN_NORM = 1e-4
"""Lower limit for the norms of a_i and b_i in the denominator, as in peft. B is zero at the start of a stage."""


class DeloraBranch(LowRankBranch):
    """DeLoRA.

    Attributes:
        delora_A, delora_B: factors A [rank, in] and B [out, rank].
        delora_lambda: bound lambda [1], trained.
        delora_w_norm: column norms w [in], frozen.
    """

    delora_A: nn.Parameter
    delora_B: nn.Parameter
    delora_lambda: nn.Parameter
    delora_w_norm: nn.Parameter
    kinds = frozenset({"linear", "conv", "embedding", "recurrent"})
    zeros: ClassVar[tuple[str, ...]] = ("delora_B",)
    beside_quantized = False
    defaults: ClassVar[Mapping[str, float]] = {"bound": 15.0}
    checks: ClassVar[Mapping[str, Check]] = {
        "bound": Check(lambda bound: bound > 0, "give a number above 0, because it bounds the norm of the delta")
    }

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A, B, lambda and w."""
        a, b = site.factor_shapes
        return {"delora_A": a, "delora_B": b, "delora_lambda": (1,), "delora_w_norm": (a[-1],)}

    @classmethod
    def initial_values(cls, site: Site, seed: int, stage: int) -> dict[str, torch.Tensor]:
        """Return a random A, zeros for B, and the bound for lambda. `start` sets w."""
        return {
            **super().initial_values(site, seed, stage),
            "delora_A": random_factor(seed, stage, "delora_A", site.weight, site.factor_shapes[0]),
            "delora_lambda": torch.full((1,), float(cls.options_at(site)["bound"])),
        }

    @classmethod
    def trainable_names(cls, site: Site) -> Collection[str]:
        """Return the names of A, B and lambda."""
        return ("delora_A", "delora_B", "delora_lambda")

    @classmethod
    def starts_from(cls, spec: CascadeSpec, running: bool) -> tuple[str, ...]:
        """Return `weight`, from which w is computed."""
        return ("weight",)

    @property
    def down(self) -> torch.Tensor:
        """`A diag(w)`."""
        return self.delora_A * self.delora_w_norm

    @property
    def up(self) -> torch.Tensor:
        """`B diag(lambda / (r |a_i| |b_i|))`."""
        rows = self.delora_A.norm(dim=1).clamp_min(MIN_NORM)
        columns = self.delora_B.norm(dim=0).clamp_min(MIN_NORM)
        factors: torch.Tensor = self.delora_B * (self.delora_lambda / self.rank / (rows * columns))
        return factors

    def start(self, weight: StartWeight) -> None:
        """Set w to the column norms of the weight."""
        with torch.no_grad():
            self.delora_w_norm.copy_(self.matrix(weight.exact()).norm(dim=0))

"""LoKr (2309.14859, LyCORIS): `delta = s w1 (x) w2`, a Kronecker product of two trained factors.

The numbers of outputs and inputs are each split into two factors that are as equal as possible, or as the option
`decompose_factor` says. w1 has the smaller factors, and w2 the larger ones and the kernel of a convolution. If r is
less than half the longer side of w2, then w2 is itself a product of rank r. w1 starts at zero, and w2 at random values.
Source: LyCORIS, section 3; `LoKrModel` of peft with decompose_both=False.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from lorasc_fx.branch.contract import Branch
from lorasc_fx.branch.lora import random_factor
from lorasc_fx.plan import Site
from lorasc_fx.util.decode import Check


class LokrBranch(Branch):
    """LoKr. Computes the adapted weight.

    Attributes:
        lokr_w1: w1 [out_1, in_1].
        lokr_w2: w2 [out_2, in_2, *kernel]. If it is a product: lokr_w2_a [out_2, rank] and
            lokr_w2_b [rank, in_2 * kernel].
    """

    lokr_w1: nn.Parameter
    kinds = frozenset({"linear", "conv"})
    zeros: ClassVar[tuple[str, ...]] = ("lokr_w1",)
    options = frozenset({"lora_alpha", "use_rslora"})
    defaults: ClassVar[Mapping[str, float]] = {"decompose_factor": -1}
    checks: ClassVar[Mapping[str, Check]] = {
        "decompose_factor": Check(
            lambda factor: factor == int(factor) and (factor == -1 or factor >= 1),
            "give the number of rows of w1, an integer of 1 or more, or -1 for the most even split",
        )
    }

    @classmethod
    def fault(cls, site: Site) -> str:
        """Return why another rank in later stages is refused, or "". It may need other parameters."""
        return "cannot have another rank in later stages. Remove ranks" if site.options.ranks else ""

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shapes of w1, and of w2 or its factors."""
        factor = int(cls.options_at(site)["decompose_factor"])
        out, columns, kernel = *site.matrix_shape, tuple(site.shape[2:])
        (out_1, out_2), (in_1, in_2) = factors(out, factor), factors(columns // math.prod(kernel), factor)
        if site.rank >= max(out_2, in_2) / 2:
            return {"lokr_w1": (out_1, in_1), "lokr_w2": (out_2, in_2, *kernel)}
        return {
            "lokr_w1": (out_1, in_1),
            "lokr_w2_a": (out_2, site.rank),
            "lokr_w2_b": (site.rank, in_2 * math.prod(kernel)),
        }

    @classmethod
    def initial_values(cls, site: Site, seed: int, stage: int) -> Mapping[str, torch.Tensor]:
        """Return zeros for w1, and random values for the others."""
        values = dict(super().initial_values(site, seed, stage))
        for name in values.keys() - {"lokr_w1"}:
            flat = values[name].flatten(1).shape
            values[name] = random_factor(seed, stage, name, site.weight, flat).view(values[name].shape)
        return values

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return the Kronecker product in the shape of the weight."""
        parameters = dict(self.named_parameters())
        w2: torch.Tensor | None = parameters.get("lokr_w2")
        w2 = parameters["lokr_w2_a"] @ parameters["lokr_w2_b"] if w2 is None else w2
        w1, matrix = self.lokr_w1, w2.flatten(1)
        # Rows of the product are (out_1, out_2) and columns (in_1, in_2, *kernel), in the order of the weight.
        product = torch.kron(w1, matrix) * self.scale
        return (product.t() if self.transposed else product).reshape(self.weight_shape)


def factors(dimension: int, factor: int) -> tuple[int, int]:
    """Split a dimension into two factors, like peft.

    If the given factor divides the dimension, return it and the quotient. Otherwise return the two most equal factors,
    the smaller one first. The smaller one is at most the given factor, unless this is -1.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    small = max(value for value in range(1, math.isqrt(dimension) + 1) if dimension % value == 0 and value <= limit)
    return small, dimension // small

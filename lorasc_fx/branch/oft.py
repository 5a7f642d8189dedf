"""OFT (2306.07280): `W' = W R^T` with a trained block-diagonal rotation R of the inputs.

Each block is the Cayley transform `R = (I + Q)(I - Q)^-1` of a trained skew-symmetric matrix Q, or the first terms of
its Neumann series `I + 2 Q + 2 Q^2 + ... + Q^n` (OFTv2, 2506.19847, the default of peft). Q starts at zero. `rank` is
the size of a block. If it does not divide the number of inputs, the nearest size that does is used, as in peft. (peft
may choose size 1, which has no parameters.) The scale is 1. Source: OFT, section 3; `OFTModel` of peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from lorasc_fx.branch.contract import Branch
from lorasc_fx.branch.products import PRODUCTS
from lorasc_fx.plan import Site
from lorasc_fx.util.decode import Check


class OftBranch(Branch):
    """OFT. Computes the adapted weight, or for products the rotated input.

    Attributes:
        oft_R: entries of each Q above the diagonal, [blocks, size * (size - 1) / 2].
        positions: indices of these entries in the flattened Q.
    """

    oft_R: nn.Parameter
    positions: torch.Tensor
    kinds = frozenset({"linear", "conv", "embedding", "recurrent"})
    zeros: ClassVar[tuple[str, ...]] = ("oft_R",)
    defaults: ClassVar[Mapping[str, float]] = {"neumann_terms": 5}
    checks: ClassVar[Mapping[str, Check]] = {
        "neumann_terms": Check(
            lambda terms: terms == int(terms) and (terms == 0 or terms >= 2),  # with 1 term, R is the identity
            "give a number of terms, an integer of 2 or more, or 0 for the exact transform",
        )
    }
    uses_weight = True

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        self.size = block_size(site.matrix_shape[1], site.rank)
        self.terms = int(self.options_at(site)["neumann_terms"])
        rows, columns = torch.triu_indices(self.size, self.size, 1, device=like.device)
        self.register_buffer("positions", rows * self.size + columns, persistent=False)

    @classmethod
    def fault(cls, site: Site) -> str:
        """Return why a single input, or another rank in later stages, is refused, or ""."""
        if site.options.ranks:
            return "cannot have blocks of another size in later stages. Remove ranks"
        if site.matrix_shape[1] == 1:
            return f"has a single input, which cannot be rotated. Exclude the weight (exclude=({site.weight!r},))"
        return ""

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shape of the entries of Q."""
        columns = site.matrix_shape[1]
        size = block_size(columns, site.rank)
        return {"oft_R": (columns // size, size * (size - 1) // 2)}

    def rotation(self) -> torch.Tensor:
        """Return `R - I` [blocks, size, size]."""
        blocks, size = self.oft_R.shape[0], self.size
        upper = self.oft_R.new_zeros(blocks, size * size).scatter(1, self.positions.expand(blocks, -1), self.oft_R)
        upper = upper.view(blocks, size, size)
        skew = upper - upper.transpose(-2, -1)
        if not self.terms:
            identity = torch.eye(size, device=skew.device, dtype=skew.dtype)
            rotation: torch.Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
            return rotation - identity
        # The coefficients are 2, except 1 for the last power if it is not the first. As in peft, 3 terms count as 4.
        last = max(self.terms, 4) - 1 if self.terms > 2 else self.terms - 1
        total, power = torch.zeros_like(skew), skew
        for exponent in range(1, last + 1):
            total = total + (power if exponent == last > 1 else 2 * power)
            power = power @ skew
        return total

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return `W (R - I)^T` in the shape of the weight."""
        assert weight is not None
        matrix, rotation = self.matrix(weight), self.rotation().to(weight.dtype)
        blocks = matrix.reshape(matrix.shape[0], -1, self.size).transpose(0, 1)
        moved = (blocks @ rotation.transpose(-2, -1)).transpose(0, 1).reshape(matrix.shape)
        return (moved.t() if self.transposed else moved).reshape(weight.shape)

    def in_place(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str, **options: Any
    ) -> torch.Tensor:
        """Return the output of the op with the adapted weight.

        For a product, compute with the rotated input `x R` instead, so that the backward needs no gradient of the full
        weight.
        """
        if op == "conv" or not self.scale:
            return super().in_place(x, weight, bias, op=op, **options)
        blocks = x.unflatten(-1, (-1, self.size))
        moved = torch.einsum("...bi,bij->...bj", blocks, self.rotation().to(x.dtype))
        return PRODUCTS[op](x + moved.reshape(x.shape).to(x.dtype), weight, bias)


def block_size(columns: int, size: int) -> int:
    """Return the divisor of `columns` that is nearest to `size`, the smaller one in a tie.

    Size 1 is returned only for a single input, because such a block has no parameters.
    """
    if size >= columns:
        return columns
    above = next(value for value in range(size, columns + 1) if columns % value == 0)
    below = next(value for value in range(size, 0, -1) if columns % value == 0)
    return below if below > 1 and size - below <= above - size else above

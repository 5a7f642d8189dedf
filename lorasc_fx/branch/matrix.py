"""The branch of a weight that is a matrix, or a stack of them: beside a product or a lookup, merged into it, or on the
weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorasc_fx.branch.beside import Beside
from lorasc_fx.branch.branch import Branch
from lorasc_fx.branch.grouped import grouped
from lorasc_fx.branch.merged import PRODUCTS, MergedProduct
from lorasc_fx.branch.shared import SharedUp
from lorasc_fx.branch.skinny import apply, by_hand, computes_in, plus

__all__ = ["MatrixBranch"]


class MatrixBranch(Branch):
    """`forward(base, x)` beside a product or a lookup, `forward(weight)` on the weight, or in place of a product
    `forward(x, weight, bias, op=...)`.
    """

    def forward(
        self,
        base: torch.Tensor,
        x: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        lookup: bool = False,
        padding_idx: int = -1,
        op: str = "",
        shared: bool = False,
        expert: int | torch.Tensor | None = None,
        offs: torch.Tensor | None = None,
        by: str = "",
    ) -> torch.Tensor:
        """Return base plus the branch's term (algorithm.md, row "training").

        Args:
            base: [..., out], what the base op computes; without x the weight itself, as it is stored.
            x: [..., in], the base op's input; for a lookup the indices [...].
            lookup: the base op is an embedding: rows of lora_B are looked up; what is looked up at padding_idx gives no
                factor a gradient, as it gives the table none.
            op: name of the product that is computed here, with the merged weight: then base is x, x is the weight as
                it is stored, and bias the op's own.
            shared: x is what lora_A makes of the input already, [..., rank], with that of other branches.
            expert: base is the matrix that this index, of no axis, takes out of a stack.
            offs: x is [rows, in], sorted by expert, and each expert's rows end here, [experts].
            by: name of the op that computes such a grouped product, as `torch.ops` has it.
        """
        if x is None:
            delta = self.delta() if expert is None else self._of(expert)
            return plus(base, delta.to(base.dtype), self.scale)
        if op:
            return self._merged(base, x, bias, op)
        if offs is not None:
            return plus(base, grouped(x, self.lora_A, self.up, offs, by).to(base.dtype), self.scale)
        if lookup:
            down = F.embedding(x, self.up.to(base.dtype), padding_idx if padding_idx >= 0 else None)
            delta = (down @ self.lora_A.to(down.dtype)).to(base.dtype)  # autocast lets a lookup's dtype alone
            term = plus(base, delta, self.scale)
            return torch.where((x == padding_idx).unsqueeze(-1), term.detach(), term) if padding_idx >= 0 else term
        if self.carried_A is not None and self.carried_B is not None:
            base = base + F.linear(F.linear(x, self.carried_A.to(x.dtype)), self.carried_B.to(x.dtype)).to(base.dtype)
        return self._above(base, x) if shared else self._beside(base, x)

    def _of(self, expert: int | torch.Tensor) -> torch.Tensor:
        delta = self.up[expert] @ self.lora_A[expert]
        return delta.transpose(-2, -1) if self.transposed else delta

    def _beside(self, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if by_hand(base, x):
            a, b, seed = self.lora_A.to(base.dtype), self.up.to(base.dtype), self.seed()
            return apply(Beside, base, x.to(base.dtype), a, b, self.scale, self.dropout, seed)
        x = F.dropout(x, self.dropout) if self.drops else x
        return self._added(base, F.linear(x, self.lora_A.to(x.dtype)))

    def _above(self, base: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        if by_hand(base, low):
            return apply(SharedUp, base, low.to(base.dtype), self.up.to(base.dtype), self.scale)
        return self._added(base, low)

    def _added(self, base: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        if isinstance(base, torch.Tensor) and base.is_nested:  # a proxy of a tracer is neither
            return base + F.linear(low, self.up.to(low.dtype)) * self.scale
        rows, up = base.reshape(-1, base.shape[-1]), self.up.t().to(low.dtype)
        return torch.addmm(rows, low.reshape(-1, low.shape[-1]), up, alpha=self.scale).view(base.shape)

    def _merged(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, op: str) -> torch.Tensor:
        if not by_hand(x, weight):
            return self._beside(PRODUCTS[op](x, weight, bias), x)
        dtype = computes_in(x)
        bias = bias.to(dtype) if bias is not None else None
        return apply(MergedProduct, x.to(dtype), weight, bias, self.lora_A, self.up, self.scale, op)

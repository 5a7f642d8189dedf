"""The branch of a weight that is a matrix, or a stack of them: beside a product, beside a lookup, or on the weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorasc_fx.branch.branch import Branch

__all__ = ["MatrixBranch"]


class MatrixBranch(Branch):
    """`forward(base, x)` beside a product or a lookup, `forward(weight)` on the weight; the accumulate scales."""

    def forward(
        self, base: torch.Tensor, x: torch.Tensor | None = None, lookup: bool = False, padding_idx: int = -1
    ) -> torch.Tensor:
        """Return base plus the branch's term (algorithm.md, row "training").

        Args:
            base: [..., out], what the base op computes; without x the weight itself, as it is stored.
            x: [..., in], the base op's input; for a lookup the indices [...].
            lookup: the base op is an embedding: rows of lora_B are looked up; what is looked up at padding_idx gives no
                factor a gradient, as it gives the table none.
        """
        if x is None:
            return torch.add(base, self.delta().to(base.dtype), alpha=self.scale)
        if lookup:
            down = F.embedding(x, self.lora_B.to(base.dtype), padding_idx if padding_idx >= 0 else None)
            delta = (down @ self.lora_A.to(down.dtype)).to(base.dtype)  # autocast lets a lookup's dtype alone
            term = torch.add(base, delta, alpha=self.scale)
            return torch.where((x == padding_idx).unsqueeze(-1), term.detach(), term) if padding_idx >= 0 else term
        if self.carried_A is not None and self.carried_B is not None:
            base = base + F.linear(F.linear(x, self.carried_A.to(x.dtype)), self.carried_B.to(x.dtype)).to(base.dtype)
        down, up = F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.t()
        if isinstance(base, torch.Tensor) and base.is_nested:  # a proxy of a tracer is neither
            return base + F.linear(down, self.lora_B.to(down.dtype)) * self.scale
        rows = base.reshape(-1, base.shape[-1])
        term = torch.addmm(rows, down.reshape(-1, down.shape[-1]), up.to(down.dtype), alpha=self.scale)
        return term.view(base.shape)

"""The branch of a linear site, beside the base op: `y + scale * (x A^T) B^T`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lorasc_fx.branch.branch import Branch

__all__ = ["LinearBranch"]


class LinearBranch(Branch):
    """`forward(base [..., out], x [..., in]) -> [..., out]`; the scale rides on the one fused accumulate."""

    def forward(self, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return base plus the branch's term (algorithm.md, row "training")."""
        down = F.linear(x, self.lora_A.to(x.dtype))
        up = self.lora_B.to(x.dtype).t()
        rows = base.reshape(-1, base.shape[-1])
        return torch.addmm(rows, down.reshape(-1, down.shape[-1]), up, alpha=self.scale).view(base.shape)

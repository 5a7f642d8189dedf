"""The branch of a weight that is a matrix, or a stack of matrices: one method for each place where it can stand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lorasc_fx.branch.base import Branch
from lorasc_fx.branch.functions import Beside, DenseGradient, MergedProduct, SharedUp
from lorasc_fx.branch.low_rank import apply, by_hand, computes_in, plus
from lorasc_fx.branch.products import PRODUCTS, FrozenGrouped

_ALIGNED = 8
"""Entries of 2 bytes in the 16 bytes by which torch's grouped matmul wants every stride to be divisible."""


_SMALL = 1 << 15
"""Entries of a product's input, and of its output, up to which torch's own backward of plain operations takes less time
than one by hand: Python runs that for longer than both compute."""


class MatrixBranch(Branch):
    """Beside a product, a lookup or a grouped product, after a shared product, in place of a product, or on the weight.

    Source of all: algorithm.md, row "training", `W_t x + s B A x`.
    """

    def forward(self, first: torch.Tensor, second: Any = None, *rest: Any, **options: Any) -> torch.Tensor:
        """Compute at the branch's placement in the graph, as `Branch.forward` does; further, beside an op:

        - `forward(base, indices, lookup=True, padding_idx=...)`: `at_lookup`;
        - `forward(base, low, shared=True)`: `after_shared`;
        - `forward(base, x, offs=..., by=..., weight=...)`: `grouped`.
        """
        if options.pop("lookup", False):
            return self.at_lookup(first, second, **options)
        if options.pop("shared", False):
            return self.after_shared(first, second)
        if "offs" in options:
            return self.grouped(first, second, **options)
        return super().forward(first, second, *rest, **options)

    def beside(self, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return `base + s B A x` of base [..., out], x [..., in]; of a quantized weight with what stages added."""
        if self.unmerged_A is not None and self.unmerged_B is not None:
            base = base + F.linear(F.linear(x, self.unmerged_A.to(x.dtype)), self.unmerged_B.to(x.dtype)).to(base.dtype)
        return self._beside(base, x)

    def on_weight(self, weight: torch.Tensor, expert: int | torch.Tensor | None = None) -> torch.Tensor:
        """Return `W + s B A` as the weight is stored.

        With an expert, an index of no axis, the weight is the matrix that it takes out of the stack.
        """
        if expert is None:
            delta = self.delta()
        else:
            delta = self.up[expert] @ self.lora_A[expert]
            delta = delta.transpose(-2, -1) if self.transposed else delta
        total = plus(weight, delta.to(weight.dtype), self.scale)
        return apply(DenseGradient, total) if by_hand(weight) and total.dim() == 2 else total

    def in_place(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str
    ) -> torch.Tensor:
        """Return `op(x, W + s B A, bias)`: the product of this name, with the merged weight as it is stored.

        Where no backward by hand may run, `op(x, W, bias) + s B A x`, the same up to rounding.
        """
        if not by_hand(x, weight):
            return self._beside(PRODUCTS[op](x, weight, bias), x)
        dtype = computes_in(x)
        bias = bias.to(dtype) if bias is not None else None
        return apply(MergedProduct, x.to(dtype), weight, bias, self.lora_A, self.up, self.scale, op)

    def at_lookup(self, base: torch.Tensor, indices: torch.Tensor, padding_idx: int = -1) -> torch.Tensor:
        """Return `base + s B[indices] A` of base [..., out], indices [...]; B is [entries, rank].

        What is looked up at padding_idx gives no factor a gradient, as it gives the table none.
        """
        low = F.embedding(indices, self.up.to(base.dtype), padding_idx if padding_idx >= 0 else None)
        delta = (low @ self.lora_A.to(low.dtype)).to(base.dtype)  # autocast does not change the dtype of a lookup
        total = plus(base, delta, self.scale)
        return torch.where((indices == padding_idx).unsqueeze(-1), total.detach(), total) if padding_idx >= 0 else total

    def after_shared(self, base: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Return `base + s B low` of base [..., out], low [..., rank]: A x is made with that of other branches."""
        if by_hand(base, low):
            return apply(SharedUp, base, low.to(base.dtype), self.up.to(base.dtype), self.scale)
        return self._added(base, low)

    def grouped(
        self, base: torch.Tensor, x: torch.Tensor, offs: torch.Tensor, by: str, weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `base + s B_e (A_e x)` for the rows x of expert e, beside a grouped product.

        Rows from `offs[-1]` on belong to no expert: they are not read, here or in the backward, and hold what the op
        leaves there, as those of the base op do. Plain operations: autograd keeps x, as the base op does, and A x.

        Args:
            base: [rows, out].
            x: [rows, in], sorted by expert.
            offs: [experts], the end of each expert's rows.
            by: qualified name of the op that makes the base op's product, as `torch.ops` has it.
            weight: [experts, in, out], of an op whose own backward would make its gradient although it is frozen.
        """
        space, _, name = by.partition("::")
        product: Any = getattr(getattr(torch.ops, space), name)
        if weight is not None and not weight.requires_grad and x.requires_grad and by_hand(base, x, weight):
            base = apply(FrozenGrouped, base.detach(), x, weight, offs, product)
        a, b, short = self.lora_A.to(x.dtype), self.up.to(x.dtype), -self.rank % _ALIGNED
        if short and space == "aten":
            a, b = F.pad(a, (0, 0, 0, short)), F.pad(b, (0, short))
        term: torch.Tensor = product(product(x, a.transpose(-2, -1), offs), b.transpose(-2, -1), offs)
        return plus(base, term.to(base.dtype), self.scale)

    def _beside(self, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if by_hand(base, x) and (self.drops or max(base.numel(), x.numel()) > _SMALL):
            a, b, seed = self.lora_A.to(base.dtype), self.up.to(base.dtype), self.seed()
            return apply(Beside, base, x.to(base.dtype), a, b, self.scale, self.dropout, seed)
        x = F.dropout(x, self.dropout) if self.drops else x
        return self._added(base, F.linear(x, self.lora_A.to(x.dtype)))

    def _added(self, base: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        if isinstance(base, torch.Tensor) and base.is_nested:  # a proxy of a tracer is neither
            return base + F.linear(low, self.up.to(low.dtype)) * self.scale
        rows, up = base.reshape(-1, base.shape[-1]), self.up.t().to(low.dtype)
        return torch.addmm(rows, low.reshape(-1, low.shape[-1]), up, alpha=self.scale).view(base.shape)

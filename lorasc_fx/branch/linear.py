"""Low-rank branches of matrices, and of stacks of matrices: one function for each placement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from lorasc_fx.branch.functions import Beside, DenseGradient, MergedProduct, SharedUp
from lorasc_fx.branch.low_rank import apply, by_hand, computes_in, plus
from lorasc_fx.branch.products import PRODUCTS, FrozenGrouped

if TYPE_CHECKING:
    from lorasc_fx.branch.lora import LowRankBranch

_ALIGNED = 8
"""Entries of 2 bytes in the 16 bytes by which torch's grouped matmul wants every stride to be divisible."""


_SMALL = 1 << 15
"""Number of entries of a product's input and output up to which plain operations are faster than a hand-written
backward, because the overhead of Python exceeds the computation."""


class MatrixOps:
    """The placements of a low-rank branch: beside an op, after a shared product, in place of an op, or on the weight.

    Source of all: algorithm.md, row "training", `W_t x + s B A x`.
    """

    @staticmethod
    def beside(branch: LowRankBranch, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return `base + s B A x` of base [..., out], x [..., in]; of a quantized weight with what stages added."""
        if branch.unmerged_A is not None and branch.unmerged_B is not None:
            base = base + F.linear(F.linear(x, branch.unmerged_A.to(x.dtype)), branch.unmerged_B.to(x.dtype)).to(
                base.dtype
            )
        return MatrixOps._beside(branch, base, x)

    @staticmethod
    def on_weight(
        branch: LowRankBranch, weight: torch.Tensor, expert: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `W + s B A` as the weight is stored.

        With an expert, an index of no axis, the weight is the matrix that it takes out of the stack.
        """
        delta = branch.product() if expert is None else MatrixOps.expert_product(branch, expert)
        total = plus(weight, delta.to(weight.dtype), branch.scale)
        return apply(DenseGradient, total) if by_hand(weight) and total.dim() == 2 else total

    @staticmethod
    def expert_product(branch: LowRankBranch, expert: int | torch.Tensor) -> torch.Tensor:
        """Return the delta of one expert as its matrix is stored, without the scale."""
        delta = branch.up[expert] @ branch.down[expert]
        return delta.transpose(-2, -1) if branch.transposed else delta

    @staticmethod
    def in_place(
        branch: LowRankBranch, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str
    ) -> torch.Tensor:
        """Return `op(x, W + s B A, bias)`: the product of this name with the merged weight.

        Without a hand-written backward it is computed as `op(x, W, bias) + s B A x`, the same up to rounding.
        """
        if not by_hand(x, weight):
            return MatrixOps._beside(branch, PRODUCTS[op](x, weight, bias), x)
        dtype = computes_in(x)
        bias = bias.to(dtype) if bias is not None else None
        return apply(MergedProduct, x.to(dtype), weight, bias, branch.down, branch.up, branch.scale, op)

    @staticmethod
    def at_lookup(
        branch: LowRankBranch, base: torch.Tensor, indices: torch.Tensor, padding_idx: int = -1
    ) -> torch.Tensor:
        """Return `base + s B[indices] A` of base [..., out], indices [...]; B is [entries, rank].

        What is looked up at padding_idx gives no factor a gradient, as it gives the table none.
        """
        low = F.embedding(indices, branch.up.to(base.dtype), padding_idx if padding_idx >= 0 else None)
        delta = (low @ branch.down.to(low.dtype)).to(base.dtype)  # autocast does not change the dtype of a lookup
        total = plus(base, delta, branch.scale)
        return torch.where((indices == padding_idx).unsqueeze(-1), total.detach(), total) if padding_idx >= 0 else total

    @staticmethod
    def after_shared(branch: LowRankBranch, base: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Return `base + s B low` of base [..., out], low [..., rank], where low is A x from a shared product."""
        if by_hand(base, low):
            return apply(SharedUp, base, low.to(base.dtype), branch.up.to(base.dtype), branch.scale)
        return MatrixOps._added(branch, base, low)

    @staticmethod
    def grouped(
        branch: LowRankBranch,
        base: torch.Tensor,
        x: torch.Tensor,
        offs: torch.Tensor,
        by: str,
        weight: torch.Tensor | None = None,
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
        a, b, short = branch.down.to(x.dtype), branch.up.to(x.dtype), -branch.rank % _ALIGNED
        if short and space == "aten":
            a, b = F.pad(a, (0, 0, 0, short)), F.pad(b, (0, short))
        term: torch.Tensor = product(product(x, a.transpose(-2, -1), offs), b.transpose(-2, -1), offs)
        return plus(base, term.to(base.dtype), branch.scale)

    @staticmethod
    def _beside(branch: LowRankBranch, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        # A tracer must not see the comparison of sizes: it would specialize the graph on them.
        traced = type(base) is not torch.Tensor or torch.compiler.is_compiling()
        if not traced and not branch.drops and base.numel() <= _SMALL and x.numel() <= _SMALL:
            # No view and no `addmm`: each of them costs more than the products.
            low = F.linear(x, branch.down.to(x.dtype))
            return torch.add(base, F.linear(low, branch.up.to(low.dtype)), alpha=branch.scale)
        if by_hand(base, x):
            a, b, seed = branch.down.to(base.dtype), branch.up.to(base.dtype), branch.dropout_seed()
            return apply(Beside, base, x.to(base.dtype), a, b, branch.scale, branch.dropout, seed)
        x = F.dropout(x, branch.dropout) if branch.drops else x
        return MatrixOps._added(branch, base, F.linear(x, branch.down.to(x.dtype)))

    @staticmethod
    def _added(branch: LowRankBranch, base: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        if isinstance(base, torch.Tensor) and base.is_nested:  # a proxy of a tracer is neither
            return base + F.linear(low, branch.up.to(low.dtype)) * branch.scale
        rows, up = base.reshape(-1, base.shape[-1]), branch.up.t().to(low.dtype)
        return torch.addmm(rows, low.reshape(-1, low.shape[-1]), up, alpha=branch.scale).view(base.shape)

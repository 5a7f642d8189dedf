"""Low-rank branches of matrices and of stacked matrices (experts): one function for each placement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from lorasc_fx.branch.functions import Beside, DenseGradient, MergedProduct
from lorasc_fx.branch.low_rank import allows_custom_backward, apply, compute_dtype, plus
from lorasc_fx.branch.products import PRODUCTS, FrozenGrouped

if TYPE_CHECKING:
    from lorasc_fx.branch.lora import LowRankBranch

_ALIGNED = 8
"""torch's grouped matmul needs strides that are multiples of 16 bytes: 8 entries of 2 bytes."""

SMALL = 1 << 15
"""Maximum number of entries of input and output for which plain operations are faster than an autograd.Function."""


class MatrixOps:
    """The placements of a low-rank branch (docs/design.md, "Placements"), as functions of the branch.

    All compute `W_t x + s B A x` (docs/algorithm.md, row "training").
    """

    @staticmethod
    def beside(branch: LowRankBranch, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return `base + s B A x` for base [..., out] and x [..., in].

        For a quantized weight, this includes the deltas of earlier stages.
        """
        if branch.unmerged_A is not None and branch.unmerged_B is not None:
            base = base + F.linear(F.linear(x, branch.unmerged_A.to(x.dtype)), branch.unmerged_B.to(x.dtype)).to(
                base.dtype
            )
        return MatrixOps._beside(branch, base, x)

    @staticmethod
    def beside_small(branch: LowRankBranch, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return what `beside` returns for small tensors, for which plain operations take less time. No dropout."""
        if branch.unmerged_A is not None:
            return MatrixOps.beside(branch, base, x)
        a, b = branch.down, branch.up
        low = F.linear(x, a if a.dtype == x.dtype else a.to(x.dtype))
        return torch.add(base, F.linear(low, b if b.dtype == low.dtype else b.to(low.dtype)), alpha=branch.scale)

    @staticmethod
    def on_weight(
        branch: LowRankBranch, weight: torch.Tensor, expert: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `W + s B A` in the layout of the weight.

        Args:
            branch: the branch.
            weight: the weight, or the matrix of one expert.
            expert: index of this expert in the stack, an int or a scalar tensor. None for the full weight.
        """
        delta = branch.product() if expert is None else MatrixOps.expert_product(branch, expert)
        total = plus(weight, delta.to(weight.dtype), branch.scale)
        return apply(DenseGradient, total) if allows_custom_backward(weight) and total.dim() == 2 else total

    @staticmethod
    def expert_product(branch: LowRankBranch, expert: int | torch.Tensor) -> torch.Tensor:
        """Return B A of one expert in the layout of its matrix, without the scale."""
        delta = branch.up[expert] @ branch.down[expert]
        return delta.transpose(-2, -1) if branch.transposed else delta

    @staticmethod
    def merged(
        branch: LowRankBranch, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str
    ) -> torch.Tensor:
        """Return `op(x, W + s B A, bias)`, the product with the merged weight. `op` is a key of PRODUCTS.

        If custom backwards are not allowed, compute `op(x, W, bias) + s B A x`, which is equal up to rounding.
        """
        if not allows_custom_backward(x, weight):
            return MatrixOps._beside(branch, PRODUCTS[op](x, weight, bias), x)
        dtype = compute_dtype(x)
        bias = bias.to(dtype) if bias is not None else None
        return apply(MergedProduct, x.to(dtype), weight, bias, branch.down, branch.up, branch.scale, op)

    @staticmethod
    def at_lookup(
        branch: LowRankBranch, base: torch.Tensor, indices: torch.Tensor, padding_idx: int = -1
    ) -> torch.Tensor:
        """Return `base + s B[indices] A` for base [..., out] and indices [...]. B is [entries, rank].

        As in `F.embedding`, entries at padding_idx contribute no gradient. A negative padding_idx means none.
        """
        low = F.embedding(indices, branch.up.to(base.dtype), padding_idx if padding_idx >= 0 else None)
        delta = (low @ branch.down.to(low.dtype)).to(base.dtype)  # autocast does not change the dtype of a lookup
        total = plus(base, delta, branch.scale)
        return torch.where((indices == padding_idx).unsqueeze(-1), total.detach(), total) if padding_idx >= 0 else total

    @staticmethod
    def grouped(
        branch: LowRankBranch,
        base: torch.Tensor,
        x: torch.Tensor,
        offs: torch.Tensor,
        by: str,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `base + s B_e (A_e x)` for the rows x of each expert e, beside a grouped product.

        Rows after the last end in `offs` belong to no expert. They are not read, in forward and backward, and their
        output is undefined, as for the base op.

        Args:
            branch: the branch.
            base: output of the grouped product, [rows, out].
            x: [rows, in], sorted by expert.
            offs: [experts], the end of the rows of each expert.
            by: qualified name of the op in `torch.ops` that computes grouped products, such as `aten::_grouped_mm`.
            weight: frozen weight [experts, in, out] of an op whose own backward would compute its gradient.
        """
        space, _, name = by.partition("::")
        product: Any = getattr(getattr(torch.ops, space), name)
        if (
            weight is not None
            and not weight.requires_grad
            and x.requires_grad
            and allows_custom_backward(base, x, weight)
        ):
            base = apply(FrozenGrouped, base.detach(), x, weight, offs, product)
        # Pad the rank with zeros, because torch's op needs aligned strides.
        a, b, padding = branch.down.to(x.dtype), branch.up.to(x.dtype), -branch.rank % _ALIGNED
        if padding and space == "aten":
            a, b = F.pad(a, (0, 0, 0, padding)), F.pad(b, (0, padding))
        term: torch.Tensor = product(product(x, a.transpose(-2, -1), offs), b.transpose(-2, -1), offs)
        return plus(base, term.to(base.dtype), branch.scale)

    @staticmethod
    def _beside(branch: LowRankBranch, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        # Tracers must not compare sizes, which would specialize the graph on them.
        if allows_custom_backward(base, x) and max(base.numel(), x.numel()) > SMALL:
            a, b, seed = branch.down.to(base.dtype), branch.up.to(base.dtype), branch.dropout_seed()
            return apply(Beside, base, x.to(base.dtype), a, b, branch.scale, branch.dropout, seed)
        x = F.dropout(x, branch.dropout) if branch.drops else x
        return MatrixOps._added(branch, base, F.linear(x, branch.down.to(x.dtype)))

    @staticmethod
    def _added(branch: LowRankBranch, base: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        """Return `base + s B low` with plain operations."""
        if isinstance(base, torch.Tensor) and base.is_nested:  # addmm does not support nested tensors
            return base + F.linear(low, branch.up.to(low.dtype)) * branch.scale
        rows, up = base.reshape(-1, base.shape[-1]), branch.up.t().to(low.dtype)
        return torch.addmm(rows, low.reshape(-1, low.shape[-1]), up, alpha=branch.scale).view(base.shape)

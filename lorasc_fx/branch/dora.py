"""The branch of a site under DoRA (2402.09353): direction by the low-rank pair, length of each row by a magnitude.

`W' = diag(g) (W + s B A)` with `g = m / |W + s B A|`, the norms taken by rows [out] and, as peft does, held constant in
the backward. It stands in place of its op, so that the product is scaled and the bias is not: `y = g (x W^T + s B A x)
+ b`. Source: DoRA, equation 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import fx, nn

from lorasc_fx.branch.base import Branch
from lorasc_fx.branch.conv import ConvBranch, ConvCall, low_rank_conv
from lorasc_fx.branch.linear import MatrixBranch
from lorasc_fx.branch.low_rank import plus
from lorasc_fx.errors import StateError
from lorasc_fx.plan import Site
from lorasc_fx.shards import WHOLE, ShardSpec, full_tensor


@fx.wrap  # one node in a trace of torch.fx, which records neither no_grad nor autocast
def row_norms(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    axis: int,
    total_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the norms of `W + scale * left @ right` along an axis of the matrix, without a gradient; 1 for 0.

    Where only a part of the axis is here, `total_of` sums the squares over those who hold the others.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        matrix = weight.detach().to(left.dtype).reshape(left.shape[0], right.shape[1])
        total = torch.addmm(matrix, left.detach(), right.detach(), alpha=scale)
        norms = torch.linalg.vector_norm(total, dim=axis)
        if total_of is not None:
            norms = total_of(norms.square()).sqrt()
        return torch.where(norms == 0, 1.0, norms)


class DoraBranch(Branch):
    """In place of a product or a convolution.

    Attributes:
        lora_magnitude_vector: m [out]; a new branch has the norms of the weight's rows.
    """

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        ones = self.lora_A.detach().new_ones(site.matrix_shape[0])  # on the meta device, until `materialize`
        self.lora_magnitude_vector = nn.Parameter(ones if like.is_meta else self.norms(like))

    @property
    def magnitude(self) -> nn.Parameter:
        """The magnitudes m [out]."""
        return self.lora_magnitude_vector

    def norms(self, weight: torch.Tensor, shard: ShardSpec = WHOLE) -> torch.Tensor:
        """Return `|W + s B A|` of each row [out] in the factors' dtype, without a gradient; 1 for a row of zeros.

        With a shard the weight is that of W, and the rows are those that are here; all-reduced where rows are cut.
        """
        left, right = self.oriented()
        if shard.axis is not None:
            left, right = full_tensor(left), full_tensor(right)
        axis = 0 if self.transposed else 1
        left, right = (shard.take(left), right) if shard.axis == 0 else (left, shard.take(right))
        return row_norms(weight, left, right, self.scale, axis, shard.group.sum_of if shard.axis == axis else None)

    def gain(self, weight: torch.Tensor) -> torch.Tensor:
        """Return g = m / |W + s B A| [out], for a weight as it is stored; 1 where the branch adds nothing, as other
        weights are in place (its scale is 0 then).
        """
        if not self.scale:
            return torch.ones_like(self.lora_magnitude_vector)
        return self.lora_magnitude_vector / self.norms(weight)

    def in_place(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str, **options: Any
    ) -> torch.Tensor:
        """Return `g (op(x, W) + s B A x) + bias`; the options are those of a convolution (`ConvCall`)."""
        total = self._conv(x, weight, ConvCall(**options)) if op == "conv" else self._product(x, weight, op)
        spread = (-1, *(1 for _ in self.weight_shape[2:])) if op == "conv" else (-1,)
        total = total * self.gain(weight).to(total.dtype).view(spread)
        if bias is None:
            return total
        return total + (bias.view(spread) if op == "conv" else bias).to(total.dtype)

    def beside(self, base: torch.Tensor, x: torch.Tensor, **options: Any) -> NoReturn:
        """Raise StateError: the product of the op has to be scaled as well."""
        raise self._misplaced()

    def on_weight(self, weight: torch.Tensor, **options: Any) -> NoReturn:
        """Raise StateError: no magnitude stands on a weight."""
        raise self._misplaced()

    def _misplaced(self) -> StateError:
        return StateError(
            f"the branch of {self.weight_name} has magnitudes and stands in place of its op only; exclude the "
            f"weight (exclude=({self.weight_name!r},)), or give use_dora=False",
            code="dora-not-supported",
        )

    def _product(self, x: torch.Tensor, weight: torch.Tensor, op: str) -> torch.Tensor:
        """Return `x (W + s B A)^T`; the weight is stored as [in, out] for every op but `linear`."""
        base = F.linear(x, weight) if op == "linear" else x @ weight
        low = F.linear(x, self.lora_A.to(x.dtype))
        return plus(base, F.linear(low, self.lora_B.to(low.dtype)), self.scale)

    def _conv(self, x: torch.Tensor, weight: torch.Tensor, call: ConvCall) -> torch.Tensor:
        """Return the convolution with `W + s B A`, without a bias."""
        image = call.padded(x)
        base = call.conv(len(self.weight_shape) - 2, image, weight)
        return plus(base, low_rank_conv(self, image, call), self.scale)


BRANCH_OF: dict[str, type[Branch]] = {
    **dict.fromkeys(("linear", "embedding", "recurrent", "experts"), MatrixBranch),
    "conv": ConvBranch,
}
"""The branch of each kind of site, without magnitudes."""


def branch_class(site: Site) -> type[Branch]:
    """Return the class of a site's branch."""
    return DoraBranch if site.options.row_scale.trained else BRANCH_OF[site.kind]

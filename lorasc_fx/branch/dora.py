"""DoRA (2402.09353): direction by a low-rank pair, length of each row by a magnitude.

`W' = diag(g) (W + s B A)` with `g = m / |W + s B A|`, the norms taken by rows [out] and, as in peft, held constant in
the backward. The branch computes in place of its op, so that the product is scaled and the bias is not:
`y = g (x W^T + s B A x) + b`. Source: DoRA, equation 5 and section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lorasc_fx.branch.contract import Branch, StartWeight, unchanged
from lorasc_fx.branch.conv import ConvCall, low_rank_conv
from lorasc_fx.branch.factors import InitialFactors, Side
from lorasc_fx.branch.lora import LoraBranch
from lorasc_fx.branch.low_rank import plus
from lorasc_fx.errors import StateError
from lorasc_fx.plan import Site
from lorasc_fx.shards import UNSHARDED, ShardSpec, full_tensor
from lorasc_fx.spec import CascadeSpec


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

    If only a slice of the axis is on this rank, `total_of` sums the squares over the ranks.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        matrix = weight.detach().to(left.dtype).reshape(left.shape[0], right.shape[1])
        total = torch.addmm(matrix, left.detach(), right.detach(), alpha=scale)
        norms = torch.linalg.vector_norm(total, dim=axis)
        if total_of is not None:
            norms = total_of(norms.square()).sqrt()
        return torch.where(norms == 0, 1.0, norms)


class DoraBranch(LoraBranch):
    """LoRA with a trained magnitude for each row, in place of a product or a convolution.

    Attributes:
        lora_magnitude_vector: m [out]; a stage starts from the row norms of its weight.
    """

    lora_magnitude_vector: nn.Parameter
    kinds = frozenset({"linear", "conv"})
    placements = frozenset({"merged"})
    options = LoraBranch.options - {"nearest_full_gradient", "dropout", "restart_pairs"}
    scales_rows = True
    beside_quantized = False

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A, B and m."""
        return {**super().shapes(site), "lora_magnitude_vector": (site.matrix_shape[0],)}

    @classmethod
    def initial_values(cls, site: Site, seed: int, stage: int) -> dict[str, torch.Tensor]:
        """Return a random A, zeros, and ones, which `start` replaces by the norms of the weight."""
        values = super().initial_values(site, seed, stage)
        return {**values, "lora_magnitude_vector": torch.ones(site.matrix_shape[0])}

    @classmethod
    def starts_from(cls, spec: CascadeSpec, running: bool) -> tuple[str, ...]:
        """Return what LoRA starts from, and the magnitude, which follows the weight of an idle stage too."""
        return (*super().starts_from(spec, running), "magnitude")

    @property
    def shared_factor(self) -> str | None:
        """No other branch can compute A x, which the magnitude scales."""
        return None

    def start(self, weight: StartWeight) -> torch.Tensor | None:
        """Set m to the row norms, and return the norms of this rank's rows."""
        norms = self.norms(weight.noisy(), weight.shard)
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(weight.whole(norms, Side.OUT))
        return norms.cpu().double().clone()

    def gain(self, weight: StartWeight) -> torch.Tensor | None:
        """Return g = m / |W + s B A| for the weight that was trained, noise included."""
        magnitude = weight.cut(full_tensor(self.lora_magnitude_vector), Side.OUT)
        return (magnitude / self.norms(weight.noisy(), weight.shard)).cpu().double()

    def moved(
        self,
        initial: InitialFactors | None = None,
        cut: Callable[[torch.Tensor, Side], torch.Tensor] = unchanged,
    ) -> bool:
        """Whether the factors or the magnitude have left their start."""
        moved = super().moved(initial, cut)  # on every rank: it gathers, and ranks may differ in their magnitudes
        if initial is not None and initial.magnitude is not None:
            current = cut(full_tensor(self.lora_magnitude_vector.detach()), Side.OUT).cpu()
            moved |= not torch.equal(current, initial.magnitude.to(current.dtype))
        return moved

    def norms(self, weight: torch.Tensor, shard: ShardSpec = UNSHARDED) -> torch.Tensor:
        """Return `|W + s B A|` of each row [out] in the factors' dtype, without a gradient; 1 for a row of zeros.

        Args:
            weight: this rank's slice of the weight.
            shard: which slice that is; all-reduced if rows are cut.
        """
        left, right = self.oriented()
        if shard.axis is not None:
            left, right = full_tensor(left), full_tensor(right)
        axis = 0 if self.transposed else 1
        left, right = (shard.take(left), right) if shard.axis == 0 else (left, shard.take(right))
        return row_norms(weight, left, right, self.scale, axis, shard.group.sum_tensor if shard.axis == axis else None)

    def placement(self, at: str) -> Callable[..., torch.Tensor]:
        """Return the method that computes in place of the op, the only placement of this branch.

        Raises:
            StateError: the node asks for another placement.
        """
        if at not in ("in_place", "adapted"):
            raise StateError(
                f"The branch of {self.weight_name} is called {at}, but a DoRA branch scales the product of its op and "
                f"can only replace the op. Exclude it (exclude=({self.weight_name!r},)), or give adapter='lora'",
                code="method-not-supported",
            )
        return Branch.placement(self, at)

    def computed_with(
        self, tensors: Mapping[str, torch.Tensor], scale: torch.Tensor, *args: Any, at: str, **options: Any
    ) -> torch.Tensor:
        """Compute with the weight that these tensors give."""
        return Branch.computed_with(self, tensors, scale, *args, at=at, **options)

    def adapted(
        self, weight: torch.Tensor, scale: torch.Tensor, expert: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `g (W + scale B A)`, and W for the scale 0, whatever the magnitude is."""
        total = weight.to(self.lora_A.dtype) + self.product() * scale
        axis, spread = (0, (1, -1)) if self.transposed else (1, (-1, *(1 for _ in self.weight_shape[1:])))
        norms = total.detach().reshape(total.shape if self.transposed else (total.shape[0], -1)).norm(dim=axis)
        gain = self.lora_magnitude_vector / torch.where(norms == 0, 1.0, norms)
        return torch.where(scale == 0, weight, (total * gain.view(spread)).to(weight.dtype))

    def in_place(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str, **options: Any
    ) -> torch.Tensor:
        """Return `g (op(x, W) + s B A x) + bias`; the options are those of a convolution (`ConvCall`)."""
        total = self._conv(x, weight, ConvCall(**options)) if op == "conv" else self._product(x, weight, op)
        spread = (-1, *(1 for _ in self.weight_shape[2:])) if op == "conv" else (-1,)
        # With the scale 0 other weights are in place, and the branch adds nothing.
        gain = (
            self.lora_magnitude_vector / self.norms(weight)
            if self.scale
            else torch.ones_like(self.lora_magnitude_vector)
        )
        total = total * gain.to(total.dtype).view(spread)
        if bias is None:
            return total
        return total + (bias.view(spread) if op == "conv" else bias).to(total.dtype)

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

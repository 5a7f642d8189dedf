"""DoRA (2402.09353): a low-rank pair changes the direction of each row, and a trained magnitude sets its norm.

`W' = diag(g) (W + s B A)` with `g = m / |W + s B A|`. The norms are taken over rows [out], and as in peft they are
constants in the backward. The branch replaces its op, so that the product is scaled but the bias is not:
`y = g (x W^T + s B A x) + b`. Source: DoRA, equation 5 and section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from lorasc_fx.branch.contract import Branch, Declared, Placement, Reshard, StartWeight
from lorasc_fx.branch.conv import ConvCall, low_rank_conv
from lorasc_fx.branch.factors import InitialFactors, Side
from lorasc_fx.branch.lora import LoraBranch
from lorasc_fx.errors import StateError
from lorasc_fx.plan import Site
from lorasc_fx.shards import UNSHARDED, ShardSpec, full_tensor
from lorasc_fx.spec import CascadeSpec


@fx.wrap  # one node in a trace of torch.fx, which would record neither no_grad nor autocast
def row_norms(
    weight: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    scale: float,
    axis: int,
    total_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the norms of `W + scale * b @ a`, without gradients. A norm of 0 is replaced by 1.

    Args:
        weight: W, whose matrix is [rows, columns].
        b, a: factors [rows, rank] and [rank, columns].
        scale: scale of the product.
        axis: axis of the matrix over which the norms are taken.
        total_of: sums a tensor over all ranks, if this axis is sharded.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        matrix = weight.detach().to(b.dtype).reshape(b.shape[0], a.shape[1])
        total = torch.addmm(matrix, b.detach(), a.detach(), alpha=scale)
        norms = torch.linalg.vector_norm(total, dim=axis)
        if total_of is not None:
            norms = total_of(norms.square()).sqrt()
        return torch.where(norms == 0, 1.0, norms)


class DoraBranch(LoraBranch):
    """LoRA with a trained magnitude for each row. Replaces a product or a convolution.

    Attributes:
        lora_magnitude_vector: m [out]. It starts at the row norms of the weight at the start of the stage.
    """

    lora_magnitude_vector: nn.Parameter
    kinds = frozenset({"linear", "conv"})
    placements = frozenset({"merged"})
    options = LoraBranch.options - {"dropout", "restart_pairs"}
    magnitude = "lora_magnitude_vector"
    beside_quantized = False

    @classmethod
    def table(cls, site: Site) -> Mapping[str, Declared]:
        """Return A and B of LoRA, and m, which `start` sets to the norms of the weight."""
        return {**super().table(site), "lora_magnitude_vector": Declared(site.matrix_shape[:1], initial=1.0)}

    @classmethod
    def starts_from(cls, spec: CascadeSpec, running: bool) -> tuple[str, ...]:
        """Return what LoRA needs, and `magnitude`. An idle stage needs it too, because m must fit its weight."""
        return (*super().starts_from(spec, running), "magnitude")

    def start(self, site: Site, values: Mapping[str, torch.Tensor], weight: StartWeight) -> Mapping[str, torch.Tensor]:
        """Return m, the row norms of the weight."""
        factors = self.oriented(values["lora_B"], values["lora_A"])
        norms = self._norms(weight.noisy(), factors, site.scale, weight.shard)
        return {self.magnitude: weight.whole(norms, Side.OUT)}

    def gain(self, weight: StartWeight) -> torch.Tensor | None:
        """Return `g = m / |W + s B A|` [out], with the noise in W, as during training."""
        magnitude = weight.cut(full_tensor(self.lora_magnitude_vector), Side.OUT)
        return (magnitude / self.norms(weight.noisy(), weight.shard)).cpu().double()

    def moved(self, initial: InitialFactors | None, cut: Reshard) -> bool:
        """Whether the factors or the magnitudes have changed since the start of the stage."""
        moved = super().moved(initial, cut)  # not in an `or`: it gathers, so every rank must call it
        if initial is not None and initial.magnitude is not None:
            current = cut(full_tensor(self.lora_magnitude_vector.detach()), Side.OUT).cpu()
            moved |= not torch.equal(current, initial.magnitude.to(current.dtype))
        return moved

    def norms(self, weight: torch.Tensor, shard: ShardSpec = UNSHARDED) -> torch.Tensor:
        """Return `|W + s B A|` for each row [out], in the dtype of the factors and without gradients.

        The norm of a zero row is replaced by 1. All-reduces if the weight is sharded within rows.

        Args:
            weight: this rank's slice of the weight.
            shard: which slice of the full weight this is.
        """
        b, a = self.oriented(self.up, self.down)
        if shard.axis is not None:
            b, a = full_tensor(b), full_tensor(a)
        return self._norms(weight, (b, a), self.scale, shard)

    def _norms(
        self, weight: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], scale: float, shard: ShardSpec
    ) -> torch.Tensor:
        """Return the norms with other full factors, in the layout of the weight, and another scale."""
        axis = 0 if self.transposed else 1
        b, a = factors
        b, a = (shard.take(b), a) if shard.axis == 0 else (b, shard.take(a))
        return row_norms(weight, b, a, scale, axis, shard.group.sum_tensor if shard.axis == axis else None)

    def placement(self, at: Placement, entries: float = math.inf) -> Callable[..., Any]:
        """Return the method for a placement. A DoRA branch can only replace its op (`merged`).

        Raises:
            StateError: the node has another placement.
        """
        if at not in (Placement.MERGED, Placement.ADAPTED):
            raise StateError(
                f"the branch of {self.weight_name} has the placement {at!r}, but DoRA can only replace its op. "
                f"Exclude the weight (exclude=({self.weight_name!r},)), or set adapter='lora'",
                code="method-not-supported",
            )
        return Branch.placement(self, at)

    def computed_with(
        self, tensors: Mapping[str, torch.Tensor], scale: torch.Tensor, *args: Any, at: Placement, **options: Any
    ) -> torch.Tensor:
        """Compute with the merged weight, see `Branch.computed_with`."""
        return Branch.computed_with(self, tensors, scale, *args, at=at, **options)

    def adapted(
        self, weight: torch.Tensor, scale: torch.Tensor, expert: int | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `g (W + scale B A)`. For scale 0 return W, with any magnitudes."""
        total = weight.to(self.lora_A.dtype) + self.product() * scale
        axis, broadcast_shape = (0, (1, -1)) if self.transposed else (1, (-1, *(1 for _ in self.weight_shape[1:])))
        norms = total.detach().reshape(total.shape if self.transposed else (total.shape[0], -1)).norm(dim=axis)
        gain = self.lora_magnitude_vector / torch.where(norms == 0, 1.0, norms)
        return torch.where(scale == 0, weight, (total * gain.view(broadcast_shape)).to(weight.dtype))

    def merged(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str, **options: Any
    ) -> torch.Tensor:
        """Return `g (op(x, W) + s B A x) + bias`. The arguments are as in `Branch.merged`.

        Computed as `y + (g - 1) (y - bias) + g s B A x` with the output y of the op, which stays the same, bit for bit,
        while g is 1 and B is 0.
        """
        output = self.product_with(x, weight, bias, op, **options)
        if not self.scale:  # inside `cascade.weights(...)`, branches change nothing
            return output
        gain = self.lora_magnitude_vector / self.norms(weight)
        if op == "conv":
            call, per_channel = ConvCall(**options), (-1, *(1 for _ in self.weight_shape[2:]))
            term, gain = low_rank_conv(self, call.padded(x), call), gain.view(per_channel)
            bias = None if bias is None else bias.view(per_channel)
        else:
            low = F.linear(x, self.lora_A.to(x.dtype))
            term = F.linear(low, self.lora_B.to(low.dtype))
        product = output if bias is None else output - bias.to(output.dtype)
        return output + ((gain - 1) * product + gain * self.scale * term).to(output.dtype)

"""LoRA (2106.09685) and DoRA (2402.09353). LoRA is the base class of all methods whose delta is a product `s B A`.

A is [rank, in] and B [out, rank], for a weight [out, in/groups, *kernel] as the matrix [out, in] (docs/algorithm.md,
rows "branch" and "training"). With stacked matrices, A and B have the axis of the stack first. For a weight that is
stored as [in, out], the delta is transposed.

In DoRA, a low-rank pair changes the direction of each row, and a trained magnitude sets its norm:
`W' = diag(g) (W + s B A)` with `g = m / |W + s B A|`. There is one norm per row [out]. As in peft, norms are constants
in the backward. The branch replaces the op, so that the product is scaled but not the bias:
`y = g (x W^T + s B A x) + b`. Source: DoRA, equation 5 and section 4.3.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.func import functional_call

from lorasc_fx.branch.contract import Branch, Declared, Reshard, StartWeight, generator
from lorasc_fx.branch.deltas import Factors, InitialFactors, Side
from lorasc_fx.branch.placements import (
    BESIDE,
    SMALL,
    ConvCall,
    ConvOps,
    GivenFactors,
    MatrixOps,
    Placement,
    beside_conv,
    low_rank_conv,
)
from lorasc_fx.errors import PassError, StateError
from lorasc_fx.plan import Site
from lorasc_fx.shards import UNSHARDED, ShardSpec, full_tensor
from lorasc_fx.spec import METHOD_OPTIONS, CascadeSpec

DOWN, UP = "lora_A", "lora_B"
"""Names of the factors A [rank, in] and B [out, rank], as in peft."""


class LowRankBranch(Branch):
    """A branch whose delta is `s B A`. A subclass defines parameters, and computes A and B from them.

    Attributes:
        unmerged_A, unmerged_B: factors of the delta of earlier stages at a quantized weight, with the scale in B. None
            if there is no such delta.
    """

    placements = frozenset({"beside", "merged", "weight"})
    beside_quantized: ClassVar[bool] = True
    unmerged_A: torch.Tensor | None
    unmerged_B: torch.Tensor | None

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        self.ops: type[MatrixOps | ConvOps] = ops_of(self.kind)
        self.register_buffer("unmerged_A", None, persistent=False)
        self.register_buffer("unmerged_B", None, persistent=False)

    @property
    @abc.abstractmethod
    def down(self) -> torch.Tensor:
        """The factor A [rank, in], or [matrices, rank, in] for stacked matrices."""

    @property
    @abc.abstractmethod
    def up(self) -> torch.Tensor:
        """The factor B [out, rank], or [matrices, out, rank] for stacked matrices."""

    @property
    def drops(self) -> bool:
        """Whether dropout applies to the input of the branch in the current mode."""
        return self.training and self.dropout > 0

    def dropout_seed(self) -> int | None:
        """Draw a seed for the dropout mask of this call. None without dropout.

        torch's default generator draws the seed, so that dropout works with manual_seed and activation checkpointing.
        """
        return int(torch.randint(2**62, ()).item()) if self.drops else None

    def delta(self, weight: torch.Tensor | None = None) -> Factors:
        """Return the factors in the layout of the weight, with the scale in the left one."""
        b, a = self.oriented(self.up, self.down)
        return Factors(b * self.scale, a)

    def oriented(self, up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (b, a) such that `b @ a` is the delta `B A` in the layout of the weight, without the scale."""
        if self.transposed:
            return down.transpose(-2, -1), up.transpose(-2, -1)
        return up, down

    def product(self) -> torch.Tensor:
        """Return the delta in the shape of the weight, without the scale."""
        b, a = self.oriented(self.up, self.down)
        return (b @ a).view(self.weight_shape)

    def dense_delta(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the delta in the shape of the weight."""
        return self.product() * self.scale

    def set_unmerged(self, pair: Factors | None, ranks: Sequence[int]) -> None:
        """Set the delta `b @ a` of earlier stages, which cannot be merged into a quantized weight. None removes it."""
        like = next(self.parameters()).detach()
        self.unmerged_B, self.unmerged_A = (None, None) if pair is None else (pair.b.to(like), pair.a.to(like))
        self.unmerged_ranks = list(ranks)

    @property
    def earlier(self) -> Sequence[Factors]:
        """The deltas of earlier stages, one per stage."""
        if self.unmerged_A is None or self.unmerged_B is None:
            return ()
        parts = zip(
            self.unmerged_B.split(self.unmerged_ranks, -1), self.unmerged_A.split(self.unmerged_ranks, -2), strict=True
        )
        return [Factors(b, a) for b, a in parts]

    def function_at(self, at: Placement, entries: float = math.inf) -> Callable[..., Any]:
        """Return the function for a placement. Small tensors have another one; see `MatrixOps.beside_small`."""
        if self.grid:
            return super().function_at(at)
        if at is Placement.ADAPTED:
            return self.adapted
        if at is Placement.FACTORS:
            return self.factors
        if at is Placement.BESIDE and self.kind != "conv" and entries <= SMALL and not self.dropout:
            return partial(MatrixOps.beside_small, self)
        functions: dict[Placement, Callable[..., torch.Tensor]] = {
            Placement.BESIDE: self.ops.beside,
            Placement.MERGED: self.ops.merged,
            Placement.WEIGHT: self.ops.on_weight,
            Placement.LOOKUP: MatrixOps.at_lookup,
            Placement.GROUPED: MatrixOps.grouped,
        }
        return partial(functions[at], self)

    def padded(self, site: Site, rank: int) -> dict[str, torch.Tensor]:
        """Return {parameter name: padded value}; see `Branch.padded`."""
        if self.unmerged_A is not None:
            raise PassError(
                f"{self.weight_name} is quantized, and its branch also adds the delta of earlier stages, which cannot "
                "become an input of the graph. Exclude the site, or lift the branches during the first stage",
                code="input-not-supported",
            )
        return super().padded(site, rank)

    def computed_with(
        self,
        tensors: Mapping[str, torch.Tensor],
        scale: torch.Tensor,
        *args: Any,
        at: Placement,
        **options: Any,
    ) -> torch.Tensor:
        """Compute a placement with given parameters, see `Branch.computed_with`. There is no dropout.

        If A is [rows, rank, in], B [rows, out, rank] and scale [rows], each row of the batch has its own factors.
        """
        if at is Placement.WEIGHT:
            return super().computed_with(tensors, scale, *args, at=at, **options)
        pair = GivenFactors(*self.factors_from(tensors), scale)
        if at is Placement.MERGED:
            x, weight, *bias = args
            op = options.pop("op")
            # Compute beside the op instead, because factors that are inputs are never merged.
            args = (self.product_with(x, weight, bias[0] if bias else None, op, **options), x)
        if self.kind == "conv":
            output, x = args
            return beside_conv(output, x, pair, ConvCall(**options), self.weight_shape)
        return BESIDE[at](*args, pair, **options)

    def factors_from(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B for given values of the parameters."""
        factors: tuple[torch.Tensor, torch.Tensor] = functional_call(self, dict(tensors), (), {"at": Placement.FACTORS})
        return factors

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B."""
        return self.down, self.up

    def adapted(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return `weight + scale * B A`."""
        return weight + (self.product() * scale).to(weight.dtype)

    def on_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return weight plus delta, in the layout of the weight."""
        return self.ops.on_weight(self, weight)


class LoraBranch(LowRankBranch):
    """LoRA: A starts at random values, and B at zero.

    Attributes:
        lora_A: A [rank, in]. Frozen if the spec has train_A=False (LoRA-FA, 2308.03303).
        lora_B: B [out, rank].
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    pads_with_zeros = True
    options = frozenset(METHOD_OPTIONS)

    @classmethod
    def table(cls, site: Site) -> Mapping[str, Declared]:
        """Return A, which starts random and is frozen if train_A is False, and B, which starts at zero."""
        a, b = site.factor_shapes
        return {"lora_A": Declared(a, random_factor, site.options.train_A), "lora_B": Declared(b)}

    @classmethod
    def starts_from(cls, spec: CascadeSpec, running: bool) -> tuple[str, ...]:
        """Return `factors` if the spec computes initial factors from the weight (PiSSA)."""
        return ("factors",) if running and spec.start == "pissa" else ()

    def learning_rate(self, name: str, lr: float, spec: CascadeSpec) -> float:
        """Return the learning rate of a factor: `lr`, times `lr_ratio` for B (LoRA+, 2402.12354)."""
        return lr * spec.lr_ratio if name == "lora_B" else lr

    @property
    def down(self) -> torch.Tensor:
        """The factor A."""
        return self.lora_A

    @property
    def up(self) -> torch.Tensor:
        """The factor B."""
        return self.lora_B

    def factors_from(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the given A and B."""
        return tensors["lora_A"], tensors["lora_B"]

    def restarts(self, spec: CascadeSpec) -> bool:
        """Whether at least one factor restarts (`restart_factors`)."""
        return spec.restart_factors != "none"

    def kept_values(
        self, values: Mapping[str, torch.Tensor], spec: CascadeSpec, pairs: bool
    ) -> Mapping[str, torch.Tensor]:
        """Return both factors if `pairs`, or A if restart_factors="B". If A has inf or nan, return its new value."""
        if pairs:
            return {DOWN: full_tensor(self.lora_A.detach()), UP: full_tensor(self.lora_B.detach())}
        if spec.restart_factors != "B":
            return {}
        a = full_tensor(self.lora_A.detach())
        return {DOWN: torch.where(torch.isfinite(a).all(), a, values[DOWN])}

    def exact_factors(self, values: Mapping[str, torch.Tensor] | None = None, scale: float | None = None) -> Factors:
        """Return the full factors, or factors from `values`, in fp64 in host memory. `b` includes the scale."""
        up, down = (self.lora_B, self.lora_A) if values is None else (values[UP], values[DOWN])
        with torch.no_grad():
            b, a = map(full_tensor, self.oriented(up, down))
            return Factors(b.cpu().double() * (self.scale if scale is None else scale), a.cpu().double().clone())

    def moved(self, initial: InitialFactors | None, cut: Reshard) -> bool:
        """Whether B is nonzero. If the stage started from initial factors, whether a factor has changed."""
        if initial is None or initial.factors is None:
            return super().moved(initial, cut)
        current, start, dtype = self.exact_factors().map(cut), initial.factors, self.lora_A.dtype
        if torch.equal(current.b, start.b) and torch.equal(current.a, start.a):
            return False
        # A cast of the branch to another dtype changes the bits too, so compare in the current dtype.
        return not (
            torch.equal((current.b / self.scale).to(dtype), (start.b / self.scale).to(dtype))
            and torch.equal(current.a.to(dtype), start.a.to(dtype))
        )

    def shard_axes(self, weight: torch.Tensor, parts: int) -> dict[str, int]:
        """Return {name: axis} with axes whose length is a multiple of the number of ranks.

        FSDP would pad other axes. If the rank is not a multiple, A [rank, in] is sharded along the inputs. If the
        number of stacked matrices is not a multiple, weight and B [matrices, out, rank] are sharded along axis 1.
        """
        stacked, inputs = self.lora_A.dim() == 3, self.lora_A.dim() - 1
        if self.lora_A.shape[0] % parts == 0:
            return {}
        axes = {"lora_A": inputs} if self.lora_A.shape[inputs] % parts == 0 else {}
        if stacked and weight.dim() == 3:
            tensors = {"weight": weight, "lora_B": self.lora_B}
            axes |= {name: 1 for name, tensor in tensors.items() if tensor.shape[1] % parts == 0}
        return axes


def ops_of(kind: str) -> type[MatrixOps | ConvOps]:
    """Return the class with the placements of low-rank branches at weights of a kind."""
    return ConvOps if kind == "conv" else MatrixOps


def random_factor(seed: int, stage: int, purpose: str, weight: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a random factor [..., rank, in]: Kaiming uniform with a = sqrt(5), that is U(-1/sqrt(in), 1/sqrt(in)).

    Source: the reference code of LoRA, and the default of peft (docs/algorithm.md, row "branch"). The values are always
    drawn in fp32, so they depend only on (seed, stage, purpose, weight), not on the dtype of the branch.
    """
    bound = shape[-1] ** -0.5 if shape[-1] else 0.0
    draw = torch.rand(shape, generator=generator(seed, stage, purpose, weight), dtype=torch.float32)
    return draw.mul_(2 * bound).sub_(bound)


@fx.wrap  # one node in a torch.fx trace, because a trace records neither no_grad nor autocast
def row_norms(
    weight: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    scale: float,
    axis: int,
    total_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the norms of `W + scale * b @ a` over an axis, without gradients. A norm of 0 is replaced by 1.

    If the axis is sharded, `total_of` sums a tensor over all ranks.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        matrix = weight.detach().to(b.dtype).reshape(b.shape[0], a.shape[1])
        total = torch.addmm(matrix, b.detach(), a.detach(), alpha=scale)
        norms = torch.linalg.vector_norm(total, dim=axis)
        if total_of is not None:
            norms = total_of(norms.square()).sqrt()
        return torch.where(norms == 0, 1.0, norms)


class DoraBranch(LoraBranch):
    """LoRA with a trained magnitude for each row (DoRA). The branch replaces its product or convolution.

    Attributes:
        lora_magnitude_vector: m [out]. It starts at the row norms of the weight at the start of the stage.
    """

    lora_magnitude_vector: nn.Parameter
    kinds = frozenset({"linear", "conv"})
    placements = frozenset({"merged"})
    options = LoraBranch.options - {"dropout"}
    magnitude = "lora_magnitude_vector"
    beside_quantized = False

    @classmethod
    def table(cls, site: Site) -> Mapping[str, Declared]:
        """Return A and B of LoRA, and m, which `values_from` computes."""
        return {**super().table(site), "lora_magnitude_vector": Declared(site.matrix_shape[:1], initial=1.0)}

    @classmethod
    def starts_from(cls, spec: CascadeSpec, running: bool) -> tuple[str, ...]:
        """Return the result of LoRA and `magnitude`, also for an idle stage, because m must fit the weight in place."""
        return (*super().starts_from(spec, running), "magnitude")

    def values_from(
        self, site: Site, values: Mapping[str, torch.Tensor], weight: StartWeight
    ) -> Mapping[str, torch.Tensor]:
        """Return m, the row norms of the weight."""
        factors = self.oriented(values["lora_B"], values["lora_A"])
        norms = self._norms(weight.noisy(), factors, site.scale, weight.shard)
        return {self.magnitude: weight.whole(norms, Side.OUT)}

    def gain(self, weight: StartWeight) -> torch.Tensor | None:
        """Return `g = m / |W + s B A|` [out], where W has noise, as during training."""
        magnitude = weight.cut(full_tensor(self.lora_magnitude_vector), Side.OUT)
        return magnitude / self.norms(weight.noisy(), weight.shard)

    def moved(self, initial: InitialFactors | None, cut: Reshard) -> bool:
        """Whether the factors or the magnitudes have changed since the start of the stage."""
        moved = super().moved(initial, cut)  # not in an `or`: it gathers, so every rank must call it
        if initial is not None and initial.magnitude is not None:
            current = cut(full_tensor(self.lora_magnitude_vector.detach()), Side.OUT).cpu()
            moved |= not torch.equal(current, initial.magnitude.to(current.dtype))
        return moved

    def norms(self, weight: torch.Tensor, shard: ShardSpec = UNSHARDED) -> torch.Tensor:
        """Return `|W + s B A|` for each row [out] of this rank's slice, without gradients. 0 is replaced by 1.

        All-reduces the norms if the rows themselves are split over ranks.
        """
        b, a = self.oriented(self.up, self.down)
        if shard.axis is not None:
            b, a = full_tensor(b), full_tensor(a)
        return self._norms(weight, (b, a), self.scale, shard)

    def _norms(
        self, weight: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], scale: float, shard: ShardSpec
    ) -> torch.Tensor:
        """Return the norms for given full factors, in the layout of the weight, and a given scale."""
        axis = 0 if self.transposed else 1
        b, a = factors
        b, a = (shard.take(b), a) if shard.axis == 0 else (b, shard.take(a))
        return row_norms(weight, b, a, scale, axis, shard.group.sum_tensor if shard.axis == axis else None)

    def function_at(self, at: Placement, entries: float = math.inf) -> Callable[..., Any]:
        """Return the method for a placement. Without a grid, a DoRA branch can only replace its op (`merged`).

        Raises:
            StateError: the node has another placement.
        """
        if at not in (Placement.MERGED, Placement.ADAPTED) and not self.grid:
            raise StateError(
                f"the branch of {self.weight_name} has the placement {at!r}, but DoRA can only replace its op. "
                f"Exclude the weight (exclude=({self.weight_name!r},)), or set adapter='lora'",
                code="method-not-supported",
            )
        return Branch.function_at(self, at)

    def computed_with(
        self, tensors: Mapping[str, torch.Tensor], scale: torch.Tensor, *args: Any, at: Placement, **options: Any
    ) -> torch.Tensor:
        """Compute with the merged weight, see `Branch.computed_with`."""
        return Branch.computed_with(self, tensors, scale, *args, at=at, **options)

    def adapted(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return `g (W + scale B A)`. If scale is 0, return W, whatever the magnitudes are."""
        total = weight.to(self.lora_A.dtype) + self.product() * scale
        axis, broadcast_shape = (0, (1, -1)) if self.transposed else (1, (-1, *(1 for _ in self.weight_shape[1:])))
        norms = total.detach().reshape(total.shape if self.transposed else (total.shape[0], -1)).norm(dim=axis)
        gain = self.lora_magnitude_vector / torch.where(norms == 0, 1.0, norms)
        return torch.where(scale == 0, weight, (total * gain.view(broadcast_shape)).to(weight.dtype))

    def merged(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str, **options: Any
    ) -> torch.Tensor:
        """Return `g (op(x, W) + s B A x) + bias`. The arguments are as in `Branch.merged`.

        With the output y of the op, this is `y + (g - 1) (y - bias) + g s B A x`. It equals y, bit for bit, while g is
        1 and B is 0.
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

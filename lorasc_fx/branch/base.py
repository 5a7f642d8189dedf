"""The trainable low-rank pair of one site, and the contract of its subclasses.

`lora_A` is [rank, in] and `lora_B` is [out, rank], where a weight [out, in/groups, *kernel] is seen as the matrix
[out, in]; for stacked experts both have their axis before. The delta that a branch stands for is `scale * lora_B @
lora_A` (algorithm.md, rows "branch" and "training"), transposed where the weight is stored so. How it is added depends
on where the branch stands: each place is a method of the subclass.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lorasc_fx.branch.functions import draw_seed
from lorasc_fx.branch.noise import generator
from lorasc_fx.plan import Plan, Refusal, Site
from lorasc_fx.shards import WHOLE, ShardSpec, full_tensor, local, zeros_like
from lorasc_fx.spec import CascadeSpec


class Branch(nn.Module, abc.ABC):
    """Factors of a site; a subclass computes with them, one method for each place of a branch in a graph.

    Args:
        site: the site's description.
        seed, stage: address of the first lora_A.
        like: the site's weight, for device and dtype. Factors of a weight narrower than fp32 are fp32.
    """

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__()
        a_shape, b_shape = site.factor_shapes
        self.weight_name = site.weight
        self.weight_shape = tuple(site.shape)
        self.scale = site.scale
        self.transposed = site.layout == "in_out"
        self.slices = site.slices
        self.dropout = site.dropout
        self.nearest = site.options.nearest_full_gradient
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        start = fresh_a(seed, stage, site.weight, a_shape)
        self.lora_A = nn.Parameter(start.to(device=like.device, dtype=dtype), requires_grad=site.options.train_A)
        self.lora_B = nn.Parameter(torch.zeros(b_shape, device=like.device, dtype=dtype))
        self.unmerged_A: torch.Tensor | None
        self.unmerged_B: torch.Tensor | None
        self.register_buffer("unmerged_A", None, persistent=False)
        self.register_buffer("unmerged_B", None, persistent=False)

    def forward(self, first: torch.Tensor, second: Any = None, *rest: Any, **options: Any) -> torch.Tensor:
        """Compute at the branch's placement in the graph, which follows from the arguments of its node.

        - `forward(weight, ...)`: `on_weight`;
        - `forward(x, weight, bias, op=NAME, ...)`: `in_place`;
        - `forward(base, x, ...)`: `beside`.
        """
        if second is None:
            return self.on_weight(first, **options)
        if "op" in options:
            return self.in_place(first, second, *rest, **options)
        return self.beside(first, second, *rest, **options)

    @abc.abstractmethod
    def beside(self, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return what the base op computes, plus the branch's term of the op's input."""

    @abc.abstractmethod
    def in_place(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, op: str
    ) -> torch.Tensor:
        """Return what the op of this name computes with the adapted weight."""

    @abc.abstractmethod
    def on_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the adapted weight, as it is stored."""

    @property
    def magnitude(self) -> nn.Parameter | None:
        """The trainable length of each row [out]; None where nothing scales the rows (`RowScale`)."""
        return None

    def norms(self, weight: torch.Tensor, shard: ShardSpec = WHOLE) -> torch.Tensor:
        """Return the length of each row [out] of the adapted weight, where magnitudes scale them."""
        raise NotImplementedError(f"{type(self).__name__} has no magnitudes")

    def whole(self) -> Branch:
        """Return a copy whose factors are plain tensors, whole. Of a sharded one every rank must call this."""
        factors = {
            id(factor): nn.Parameter(full_tensor(factor.detach()).clone(), factor.requires_grad)
            for factor in self.parameters()
        }
        return copy.deepcopy(self, factors)

    @property
    def rank(self) -> int:
        """r: number of columns of lora_B."""
        return self.lora_B.shape[-1]

    @property
    def up(self) -> torch.Tensor:
        """lora_B with the gradient that the spec asks for (`nearest_full`)."""
        return nearest_full(self.lora_B, self.lora_A, self.scale, self.slices) if self.nearest else self.lora_B

    @property
    def drops(self) -> bool:
        """Whether entries of the branch's input are set to zero now."""
        return self.training and self.dropout > 0

    def seed(self) -> int | None:
        """Return a fresh seed for this call's dropout, or None without any."""
        return draw_seed() if self.drops else None

    def oriented(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (left, right) with `left @ right` the delta as the weight is stored, without the scale.

        With slices, left holds the rows of lora_B of each slice as a block on its diagonal.
        """
        if self.transposed:
            return self.lora_A.transpose(-2, -1), self.up.transpose(-2, -1)
        if self.slices:
            return torch.block_diag(*full_tensor(self.up).split(self.slices)), self.lora_A
        return self.up, self.lora_A

    def pairs(self, matrix: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return the pairs (A, B) as views, each with its rows of a matrix [out, in]; without slices there is one."""
        if not self.slices:
            return [(self.lora_A, self.lora_B, matrix)]
        return list(
            zip(self.lora_A.split(self.rank), self.lora_B.split(self.slices), matrix.split(self.slices), strict=True)
        )

    def delta(self) -> torch.Tensor:
        """Return the delta in the weight's own shape, without the scale."""
        if self.slices:
            up, down = self.up.split(self.slices), self.lora_A.split(self.rank)
            count = range(len(self.slices))  # a proxy of torch.fx cannot be iterated
            return torch.cat([up[index] @ down[index] for index in count]).view(self.weight_shape)
        left, right = self.oriented()
        return (left @ right).view(self.weight_shape)

    def set_unmerged(self, b: torch.Tensor | None, a: torch.Tensor | None) -> None:
        """Add `b @ a` beside the product as well: the delta of earlier stages, which a quantized weight cannot hold."""
        like = self.lora_A.detach()
        self.unmerged_B, self.unmerged_A = (None, None) if b is None or a is None else (b.to(like), a.to(like))

    def to_rank(self, site: Site) -> None:
        """Take on another rank, in the same Parameter objects, so that optimizers and wrappers hold them still.

        The factors of another shape are zero then, without a gradient.
        """
        self.scale = site.scale
        for factor, shape in zip((self.lora_A, self.lora_B), site.factor_shapes, strict=True):
            if tuple(factor.shape) != shape:
                fill_factor(factor, zeros_like(factor.detach(), shape))

    def next_a(self, site: Site, spec: CascadeSpec, stage: int) -> torch.Tensor:
        """Return lora_A as the stage starts it, of the site's rank, by the spec's restart_A."""
        return spec.next_a.next_a(self.lora_A, fresh_a(spec.seed, stage, site.weight, site.factor_shapes[0]))

    def finite(self) -> bool:
        """Whether no entry of the factors, as far as they are here, is inf or nan; without numbers none is."""
        if self.lora_A.is_meta:
            return True
        return all(bool(torch.isfinite(local(factor)).all()) for factor in self.parameters())

    def extra_repr(self) -> str:
        """Return what `print` shows of the branch."""
        return f"{self.weight_name}, rank={self.rank}, scale={self.scale:g}"


def fresh_a(seed: int, stage: int, weight: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return lora_A [rank, in], or [experts, rank, in], in fp32: Kaiming uniform with a = sqrt(5), which is
    U(-1/sqrt(in), 1/sqrt(in)).

    Source: LoRA's reference code and PEFT's default; algorithm.md, row "branch". The values are drawn in fp32
    whatever the dtype of the branch, so that they depend on the address alone.
    """
    bound = shape[-1] ** -0.5 if shape[-1] else 0.0
    draw = torch.rand(shape, generator=generator(seed, stage, "lora_A", weight), dtype=torch.float32)
    return draw.mul_(2 * bound).sub_(bound)


def fill_factor(factor: nn.Parameter, value: torch.Tensor) -> None:
    """Write a value into a Parameter; one of another shape becomes its own data, and its gradient goes.

    The node at which autograd gathers its gradient remembers the shape, and lives as long as any loss of before. torch
    lets go of it where the dtype changes, so that it does so for a moment.
    """
    if factor.shape == value.shape:
        with torch.no_grad():
            factor.copy_(value)
        return
    factor.grad = None
    held: Any = factor
    data: Any
    for data in (value.detach().half(), value.detach()):
        held.data = data
        if hasattr(data, "to_local"):  # `.data` exchanges no more of a DTensor than what C++ holds
            held._local_tensor, held._spec = data._local_tensor, data._spec


_DIAGONAL = 1e-8


@fx.wrap  # one node in a trace of torch.fx, which records no autocast
def nearest_full(b: torch.Tensor, a: torch.Tensor, scale: float, slices: tuple[int, ...]) -> torch.Tensor:
    """Return lora_B; its gradient is multiplied by `(A A^T)^-1 / scale^2`, the nearest to full training for a fixed A.

    A step of B moves the weight by `s dB A`. The dB for which that is nearest to the weight's own gradient G, in the
    Frobenius norm, is `G A^T (A A^T)^-1 / s`, which is lora_B's gradient `s G A^T` times `(A A^T)^-1 / s^2`. Source:
    LoRA-Pro (2407.18242), equation for a fixed A; peft's optimizer for LoRA-FA (2308.03303) steps so, and adds the same
    1e-8 to the diagonal.

    Plain operations, for whoever compiles or transforms them: what is added to the values is a product of zeros.

    Args:
        b: lora_B [out, rank], or with an axis of experts before.
        a: lora_A [rank, in], likewise; with slices [slices * rank, in].
        scale: s of the branch.
        slices: rows of lora_B of each slice that has a lora_A of its own; empty for one of all.
    """
    if not torch.is_grad_enabled():
        return b
    slices = slices or (b.shape[-2],)
    with torch.autocast(b.device.type, enabled=False):
        pairs = zip((b - b.detach()).split(slices, -2), a.detach().chunk(len(slices), -2), strict=True)
        return b.detach() + torch.cat([zero @ _inverse(down, scale) for zero, down in pairs], -2)


def _inverse(a: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `(A A^T)^-1 / scale^2`, [rank, rank]."""
    gram = a @ a.transpose(-2, -1)
    steady = gram + _DIAGONAL * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse: torch.Tensor = torch.linalg.pinv(steady)
    return inverse / scale**2


@dataclass(frozen=True)
class Decided:
    """What is known of the weights, in all graphs so far."""

    plan: Plan
    branches: Mapping[str, Branch]
    refusals: tuple[Refusal, ...]
    unreached: tuple[str, ...]

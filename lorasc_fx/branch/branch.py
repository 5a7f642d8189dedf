"""The trainable low-rank pair of one site, and the contract that its leaves keep.

`lora_A` is [rank, in] and `lora_B` is [out, rank], where a weight [out, in/groups, *kernel] is seen as the matrix
[out, in]; for stacked experts both have their axis before. The delta that a branch stands for is `scale * lora_B @
lora_A` (algorithm.md, rows "branch" and "training"), transposed where the weight is stored so; how it is added is the
leaf's `forward`.
"""

from __future__ import annotations

import abc

import torch
from torch import nn

from lorasc_fx.branch.dropout import draw_seed
from lorasc_fx.branch.init import fresh_a
from lorasc_fx.branch.nearest import nearest_full
from lorasc_fx.plan import Site
from lorasc_fx.shards import local, whole

__all__ = ["Branch", "fill_factor"]


class Branch(nn.Module, abc.ABC):
    """Factors of a site; a leaf adds the maths.

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
        self.parts = site.parts
        self.dropout = site.dropout
        self.nearest = site.nearest_full_gradient
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        start = fresh_a(seed, stage, site.weight, a_shape)
        self.lora_A = nn.Parameter(start.to(device=like.device, dtype=dtype), requires_grad=site.train_A)
        self.lora_B = nn.Parameter(torch.zeros(b_shape, device=like.device, dtype=dtype))
        self.carried_A: torch.Tensor | None
        self.carried_B: torch.Tensor | None
        self.register_buffer("carried_A", None, persistent=False)
        self.register_buffer("carried_B", None, persistent=False)

    @property
    def rank(self) -> int:
        """r: number of columns of lora_B."""
        return self.lora_B.shape[-1]

    @property
    def up(self) -> torch.Tensor:
        """lora_B as the maths reads it; its gradient is corrected where the spec asks for the nearest to the full."""
        return nearest_full(self.lora_B, self.lora_A, self.scale, self.parts) if self.nearest else self.lora_B

    @property
    def drops(self) -> bool:
        """Whether entries of the branch's input are set to zero now."""
        return self.training and self.dropout > 0

    def seed(self) -> int | None:
        """Return a fresh seed for this call's dropout, or None without any."""
        return draw_seed() if self.drops else None

    def oriented(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (left, right) with `left @ right` the delta as the weight is stored, without the scale.

        With parts, left holds the rows of lora_B of each slice as a block on its diagonal.
        """
        if self.transposed:
            return self.lora_A.transpose(-2, -1), self.up.transpose(-2, -1)
        if self.parts:
            return torch.block_diag(*whole(self.up).split(self.parts)), self.lora_A
        return self.up, self.lora_A

    def pairs(self, matrix: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Return the pairs (A, B) as views, each with its rows of a matrix [out, in]; without parts there is one."""
        if not self.parts:
            return [(self.lora_A, self.lora_B, matrix)]
        return list(
            zip(self.lora_A.split(self.rank), self.lora_B.split(self.parts), matrix.split(self.parts), strict=True)
        )

    def delta(self) -> torch.Tensor:
        """Return the delta in the weight's own shape, without the scale."""
        if self.parts:
            pairs = zip(self.up.split(self.parts), self.lora_A.split(self.rank), strict=True)
            return torch.cat([b @ a for b, a in pairs]).view(self.weight_shape)
        left, right = self.oriented()
        return (left @ right).view(self.weight_shape)

    def carry(self, b: torch.Tensor | None, a: torch.Tensor | None) -> None:
        """Add `b @ a` beside the product as well: what earlier stages gave a weight that is quantized."""
        like = self.lora_A.detach()
        self.carried_B, self.carried_A = (None, None) if b is None or a is None else (b.to(like), a.to(like))

    def to_rank(self, site: Site) -> None:
        """Take on another rank, in the same Parameter objects, so that optimizers and wrappers hold them still.

        The factors of another shape are zero then, without a gradient.
        """
        self.scale = site.scale
        for factor, shape in zip((self.lora_A, self.lora_B), site.factor_shapes, strict=True):
            if tuple(factor.shape) != shape:
                fill_factor(factor, factor.new_zeros(shape))

    def finite(self) -> bool:
        """Whether no entry of the factors, as far as they are here, is inf or nan; without numbers none is."""
        if self.lora_A.is_meta:
            return True
        return all(bool(torch.isfinite(local(factor)).all()) for factor in self.parameters())

    def extra_repr(self) -> str:
        """Return what `print` shows of the branch."""
        return f"{self.weight_name}, rank={self.rank}, scale={self.scale:g}"


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
    factor.data = torch.empty(0, dtype=torch.float16, device=value.device)
    factor.data = value.detach()

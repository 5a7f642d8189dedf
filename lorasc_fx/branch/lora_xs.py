"""LoRA-XS (2405.17604): `delta = s B R A`, with a trained R [rank, rank] between two frozen factors of the weight.

With the SVD `W = U diag(v) V^T` of the weight at the start of the stage, `B = U_r diag(v_r)` and `A = V_r^T`. R starts
at zero, so the delta is zero too, but the gradient of R is not. Source: LoRA-XS, section 3. The code of the authors
initializes R from N(0, 1e-5).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import torch
from torch import nn

from lorasc_fx.branch.contract import StartWeight
from lorasc_fx.branch.lora import LowRankBranch
from lorasc_fx.errors import SpecError
from lorasc_fx.plan import Site
from lorasc_fx.spec import CascadeSpec


class LoraXsBranch(LowRankBranch):
    """LoRA-XS.

    Attributes:
        xs_R: R [rank, rank], trained. [experts, rank, rank] for stacked experts.
        xs_A, xs_B: frozen factors A [rank, in] and B [out, rank].
    """

    xs_R: nn.Parameter
    xs_A: nn.Parameter
    xs_B: nn.Parameter
    zeros: ClassVar[tuple[str, ...]] = ("xs_R",)
    pads_with_zeros = True
    options = frozenset({"lora_alpha", "use_rslora"})
    beside_quantized = False

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shapes of R, A and B."""
        a, b = site.factor_shapes
        return {"xs_R": (*a[:-2], site.rank, site.rank), "xs_A": a, "xs_B": b}

    @classmethod
    def trainable_names(cls, site: Site) -> Collection[str]:
        """Return the name of R."""
        return ("xs_R",)

    @classmethod
    def starts_from(cls, spec: CascadeSpec, running: bool) -> tuple[str, ...]:
        """Return `weight`, from which A and B are computed."""
        return ("weight",)

    @property
    def down(self) -> torch.Tensor:
        """The factor A."""
        return self.xs_A

    @property
    def up(self) -> torch.Tensor:
        """`B R`."""
        return self.xs_B @ self.xs_R

    def start(self, weight: StartWeight) -> None:
        """Set A and B from the SVD of the weight. If the rank exceeds the sides of the matrix, the remainder is zero.

        Raises:
            SpecError: the weight contains inf or nan.
        """
        matrix = self.matrix(weight.exact())
        if not bool(torch.isfinite(matrix).all()):
            raise SpecError(
                f"{self.weight_name} contains inf or nan, but adapter='lora-xs' computes its decomposition. "
                f"Exclude the weight (exclude=({self.weight_name!r},)), or give another adapter",
                code="non-finite",
            )
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        count = min(self.rank, values.shape[-1])
        up, down = torch.zeros_like(self.xs_B), torch.zeros_like(self.xs_A)
        up[..., :count] = u[..., :count] * values[..., None, :count]
        down[..., :count, :] = vh[..., :count, :]
        with torch.no_grad():
            # Broadcast the factors, because a decomposition does not have the same bits on all machines.
            self.xs_B.copy_(weight.shard.group.broadcast(up))
            self.xs_A.copy_(weight.shard.group.broadcast(down))

"""LoRA-XS (2405.17604): `delta = s B R A` with a trained R [rank, rank] between two frozen factors of the weight.

With the SVD `W = U diag(v) V^T` of the weight that a stage starts from, `B = U_r diag(v_r)` and `A = V_r^T`. R starts
at zero, so that a stage starts at its weight; its gradient is not zero because B and A are not. Source: LoRA-XS,
section 3. (The authors' code starts R at N(0, 1e-5).)
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
        xs_R: R [rank, rank], trained; of stacked experts [experts, rank, rank].
        xs_A, xs_B: the frozen factors A [rank, in] and B [out, rank].
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
        """Return `weight`: A and B are factors of it."""
        return ("weight",)

    @property
    def down(self) -> torch.Tensor:
        """A."""
        return self.xs_A

    @property
    def up(self) -> torch.Tensor:
        """B R."""
        return self.xs_B @ self.xs_R

    @property
    def rank(self) -> int:
        """Number of rows of R."""
        return self.xs_R.shape[-1]

    def start(self, weight: StartWeight) -> None:
        """Take A and B out of the SVD of the weight. A rank beyond the rank of the matrix is zero.

        Raises:
            SpecError: the weight holds inf or nan.
        """
        matrix = self.matrix(weight.exact())
        if not bool(torch.isfinite(matrix).all()):
            raise SpecError(
                f"adapter is 'lora-xs', and {self.weight_name} holds inf or nan, which has no decomposition. "
                f"Exclude it (exclude=({self.weight_name!r},)), or give another adapter",
                code="non-finite",
            )
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        count = min(self.rank, values.shape[-1])
        up, down = torch.zeros_like(self.xs_B), torch.zeros_like(self.xs_A)
        up[..., :count] = left[..., :count] * values[..., None, :count]
        down[..., :count, :] = right[..., :count, :]
        with torch.no_grad():
            self.xs_B.copy_(weight.agreed(up))
            self.xs_A.copy_(weight.agreed(down))

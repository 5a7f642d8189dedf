"""SHiRA (2406.13175): trained values at fixed random positions of the weight.

The number of values is the number of parameters of LoRA with the same rank. The positions are drawn without replacement
and depend only on the seed and the name of the weight, so all stages have the same ones. Values start at zero. Source:
SHiRA, "SHiRA-Rand"; `ShiraModel` of peft with a random mask.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from lorasc_fx.branch.contract import Branch
from lorasc_fx.branch.noise import generator
from lorasc_fx.plan import Site


class ShiraBranch(Branch):
    """SHiRA. Computes the adapted weight.

    Attributes:
        shira_values: trained values [count], with `count = min(rank * (in + out), in * out)`.
        positions: a random permutation [in * out] of the indices of the flattened matrix [out, in]. The values belong
            to its first entries.
    """

    shira_values: nn.Parameter
    positions: torch.Tensor
    kinds = frozenset({"linear", "conv", "embedding", "recurrent"})
    zeros: ClassVar[tuple[str, ...]] = ("shira_values",)
    pads_with_zeros = True

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        out, columns = site.matrix_shape
        order = torch.randperm(out * columns, generator=generator(seed, 0, "shira", site.weight))
        self.matrix_shape = out, columns
        self.register_buffer("positions", order.to(like.device), persistent=False)

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shape of the values."""
        out, columns = site.matrix_shape
        return {"shira_values": (min(site.rank * (out + columns), out * columns),)}

    def delta(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return the values at their positions, and zeros elsewhere, in the shape of the weight."""
        out, columns = self.matrix_shape
        values = self.shira_values
        flat = values.new_zeros(out * columns).scatter(0, self.positions[: values.shape[0]], values)
        matrix = flat.view(out, columns)
        return (matrix.t() if self.transposed else matrix).reshape(self.weight_shape)

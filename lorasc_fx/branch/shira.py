"""SHiRA (2406.13175): trained values at fixed sparse positions of the weight, as many as LoRA of this rank trains.

The positions are drawn without replacement, by the key of the weight; every stage trains the same ones. Values start at
zero. Source: SHiRA, "SHiRA-Rand"; peft's `ShiraModel` with its random mask.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from lorasc_fx.branch.contract import Branch
from lorasc_fx.branch.noise import generator
from lorasc_fx.plan import Site


class ShiraBranch(Branch):
    """SHiRA, on the weight.

    Attributes:
        shira_values: the values [count], with `count = rank * (in + out)`, at most all entries.
        positions: index [count] of each value in the flattened matrix [out, in].
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
        """Return the values at their positions and zeros elsewhere, in the shape of the weight."""
        out, columns = self.matrix_shape
        values = self.shira_values
        flat = values.new_zeros(out * columns).scatter(0, self.positions[: values.shape[0]], values)
        matrix = flat.view(out, columns)
        return (matrix.t() if self.transposed else matrix).reshape(self.weight_shape)

"""Trainable tokens: a delta for selected rows of an embedding, and of a head that is tied to it.

`delta = E D`, with D [count, in] trained from zero, and E [out, count] the columns of the identity matrix for the
selected rows. Other rows keep their bits. Source: `trainable_token_indices` of peft (`tuners/trainable_tokens`), which
trains the rows themselves instead of their delta. The gradients are the same.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from lorasc_fx.branch.lora import LowRankBranch
from lorasc_fx.plan import Site


class TokensBranch(LowRankBranch):
    """Trains the rows of a weight that a rule names: `Rule(pattern, tokens=...)`.

    Attributes:
        token_deltas: D [count, in].
        rows: indices [count] of the rows.
    """

    token_deltas: nn.Parameter
    rows: torch.Tensor
    kinds = frozenset({"embedding", "linear"})
    zeros: ClassVar[tuple[str, ...]] = ("token_deltas",)

    def __init__(self, site: Site, seed: int, stage: int, like: torch.Tensor) -> None:
        super().__init__(site, seed, stage, like)
        self.outputs = site.matrix_shape[0]
        self.register_buffer("rows", torch.tensor(site.options.tokens, device=like.device), persistent=False)

    @classmethod
    def fault(cls, site: Site) -> str:
        """Return why the rows cannot be trained, or ""."""
        tokens, rows = site.options.tokens, site.matrix_shape[0]
        if not tokens:
            return "has no rows to train. Name them in a rule: Rule(pattern, tokens=(...))"
        if max(tokens) >= rows:
            return f"has {rows} rows, so tokens={max(tokens)} is out of range. Give rows from 0 to {rows - 1}"
        return ""

    @classmethod
    def shapes(cls, site: Site) -> dict[str, tuple[int, ...]]:
        """Return the shape of D."""
        return {"token_deltas": (len(site.options.tokens), site.matrix_shape[1])}

    @property
    def down(self) -> torch.Tensor:
        """The factor D."""
        return self.token_deltas

    @property
    def up(self) -> torch.Tensor:
        """The factor E."""
        outputs = torch.arange(self.outputs, device=self.token_deltas.device)
        return (outputs.unsqueeze(1) == self.rows).to(self.token_deltas.dtype)

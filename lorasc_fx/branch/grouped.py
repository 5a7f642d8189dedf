"""The branch beside a grouped product: rows sorted by expert, each through the pair of its own expert.

`B_e (A_e x)` for the rows x of expert e. Plain operations: autograd keeps x, which the base op keeps as well, and A x.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["grouped"]

_ALIGNED = 8
"""Entries of 2 bytes that make up the 16 by which torch's own op wants every stride to be divisible."""


def grouped(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, op: str) -> torch.Tensor:
    """Return each row through the pair of its expert, [rows, out], without the scale.

    Rows from `offs[-1]` on belong to no expert: they are not read, here or in the backward, and hold what the op leaves
    there, as those of the base op do.

    Args:
        x: [rows, in], sorted by expert.
        a: [experts, rank, in].
        b: [experts, out, rank].
        offs: [experts], the end of each expert's rows.
        op: qualified name of the op that makes the base op's product: it takes their dtype and device.
    """
    space, _, name = op.partition("::")
    product: Any = getattr(getattr(torch.ops, space), name)
    a, b, short = a.to(x.dtype), b.to(x.dtype), -a.shape[-2] % _ALIGNED
    if short and space == "aten":
        a, b = F.pad(a, (0, 0, 0, short)), F.pad(b, (0, short))
    term: torch.Tensor = product(product(x, a.transpose(-2, -1), offs), b.transpose(-2, -1), offs)
    return term

"""Where a stage's factors start from the weight itself, and what such a branch has moved.

PiSSA (2404.02948) and OLoRA (2406.01775) take B_0 and A_0 out of the weight: while the stage trains, the parameter
holds the residual `W_t - s B_0 A_0`, so that nothing is changed at the start. What has trained is
`s (B A - B_0 A_0)`, kept as one pair of twice the rank, `[B - B_0, B_0] [A; A - A_0]`: both of its terms are as small
as the change, and exactly zero before the first step.
"""

from __future__ import annotations

import torch

from lorasc_fx.branch.accumulate import exact_products
from lorasc_fx.branch.branch import Branch
from lorasc_fx.branch.dora import DoraBranch
from lorasc_fx.branch.kept import Began, Factors
from lorasc_fx.branch.rows import Rows, local, whole
from lorasc_fx.errors import SpecError
from lorasc_fx.spec import Start

__all__ = ["began_of", "began_shapes", "factors_of", "has_trained", "leading"]


def leading(how: Start, branch: Branch, weight: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lora_A and lora_B as they start from a weight, in its dtype, on its device.

    `pissa`: with `W = U diag(v) V^T` of the r largest singular values, `B_0 = U sqrt(v / s)`, `A_0 = sqrt(v / s) V^T`,
    so that `s B_0 A_0` is the nearest matrix of rank r. `olora`: with `W = Q R`, `B_0` is the first r columns of Q and
    `A_0` the first r rows of R. A rank beyond the matrix's own starts as in LoRA.

    Args:
        how: `pissa` or `olora`.
        branch: whose shapes, scale and slices count; its values do not.
        weight: as it is stored; each slice of a packed one, and each of stacked experts, is decomposed by itself.
        a: lora_A as LoRA starts it.

    Raises:
        SpecError: the weight holds inf or nan.
    """
    if not bool(torch.isfinite(weight).all()):
        raise SpecError(
            f"start is {how!r}, and {branch.weight_name} holds inf or nan, which has no decomposition. "
            f"Exclude it (exclude=({branch.weight_name!r},)), or give start='lora'"
        )
    out, columns = branch.lora_B.shape[-2], branch.lora_A.shape[-1]
    stack = tuple(branch.lora_B.shape[:-2])
    matrix = weight.reshape(*stack, columns, out).mT if branch.transposed else weight.reshape(*stack, out, columns)
    a = a.to(matrix, copy=True)
    b = torch.zeros(branch.lora_B.shape, dtype=matrix.dtype, device=matrix.device)
    rows = matrix.split(branch.parts) if branch.parts else (matrix,)
    ups = b.split(branch.parts) if branch.parts else (b,)
    downs = a.split(branch.rank) if branch.parts else (a,)
    with exact_products(matrix):
        for each, up, down in zip(rows, ups, downs, strict=True):
            if how == "pissa":
                left, values, right = torch.linalg.svd(each, full_matrices=False)
                root = (values / branch.scale).sqrt()
                left, right = left * root.unsqueeze(-2), root.unsqueeze(-1) * right
            else:
                left, right = torch.linalg.qr(each)
            count = min(branch.rank, right.shape[-2])
            up[..., :count] = left[..., :count]
            down[..., :count, :] = right[..., :count, :]
    return a, b


def began_of(branch: Branch) -> Factors:
    """Return the factors as they are, in fp64 with the scale folded in, on the host: where a stage began."""
    with torch.no_grad():
        left, right = branch.oriented()
        return Factors((left.double() * branch.scale).cpu(), right.double().cpu().clone())


def began_shapes(branch: Branch) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of `b` and `a` of `began_of`."""
    left, right = branch.oriented()
    return tuple(left.shape), tuple(right.shape)


def has_trained(branch: Branch, began: Began | None) -> bool:
    """Whether a branch, as far as it is here, has left its start: B = 0, or the factors and magnitudes that it began
    with. One that was cast since has not.
    """
    magnitude = began.magnitude if began is not None else None
    if magnitude is not None and isinstance(branch, DoraBranch):
        own = branch.lora_magnitude_vector.detach().cpu()
        if not torch.equal(own, magnitude.to(own.dtype)):
            return True
    if began is None or began.factors is None:
        return bool(local(branch.lora_B).any())
    now, first = began_of(branch), began.factors
    if torch.equal(now.b, first.b) and torch.equal(now.a, first.a):
        return False
    left, right = (factor.detach().cpu() for factor in branch.oriented())
    return not (
        torch.equal((first.b / branch.scale).to(left.dtype), left) and torch.equal(first.a.to(right.dtype), right)
    )


def factors_of(branch: Branch, device: torch.device, began: Began | None = None, part: Rows | None = None) -> Factors:
    """Return what the branch has added since its start as factors on a device, as the weight is stored, the scale
    folded in: copies of its own where it started from B = 0, else `[B - B_0, B_0]` and `[A; A - A_0]`.

    With a part `b @ a` is that of those rows: of a factor that is sharded as the weight is, its own rows are taken
    without a word to the other processes.
    """
    with torch.no_grad():
        left, right = branch.oriented()
        axis, stacked = part.axis if part is not None else None, right.dim() > 2
        left = _rows_of(left, part) if part is not None and axis == 0 else whole(left)
        right = _rows_of(right, part) if part is not None and (stacked or axis == 1) else whole(right)
        if began is None or began.factors is None:
            return Factors((left * branch.scale).to(device), right.clone().to(device))
        now, first, dtype = began_of(branch), began.factors, branch.lora_A.dtype
        b = torch.cat([now.b - first.b, first.b], dim=-1)
        a = torch.cat([now.a, now.a - first.a], dim=-2)
        return Factors(b.to(device, dtype), a.to(device, dtype))


def _rows_of(factor: torch.Tensor, part: Rows) -> torch.Tensor:
    """Return rows of a factor: its own shard where that is cut along them, else of all of it, which is small."""
    if any(each.is_shard(part.axis) for each in getattr(factor, "placements", ())):
        return local(factor)
    return part.of_whole(whole(factor))

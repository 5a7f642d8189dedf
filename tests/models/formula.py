"""The branch by plain products, as docs/algorithm.md has it: delta = s B A, and its gradients from the weight's."""

from __future__ import annotations

from typing import Any

import torch

import lorasc_fx as lx

SPEC = lx.CascadeSpec(rank=2, lora_alpha=3.0, pace=0.5, noise=lx.Noise(0.1), seed=3)
SCALE = SPEC.lora_alpha / SPEC.rank


def delta(site: lx.Site, branch: Any) -> torch.Tensor:
    """Return s B A in the weight's shape."""
    blocks = [b @ a for a, b, _ in _pairs(site, branch, None)]
    product = torch.cat(blocks, dim=-2) * SCALE
    return (product if site.layout == "out_in" else product.mT).reshape(site.shape)


def by_formula(site: lx.Site, branch: Any, full: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of lora_A and lora_B, from that of the weight: dA = s B^T G, dB = s G A^T."""
    out, columns = site.matrix_shape
    stack = (site.experts,) if site.experts else ()
    matrix = full.detach().reshape(*stack, *((out, columns) if site.layout == "out_in" else (columns, out)))
    matrix = matrix if site.layout == "out_in" else matrix.mT
    pairs = _pairs(site, branch, matrix)
    first = torch.cat([b.mT @ rows for _, b, rows in pairs], dim=-2)
    second = torch.cat([rows @ a.mT for a, _, rows in pairs], dim=-2)
    return SCALE * first, SCALE * second


def _pairs(site: lx.Site, branch: Any, matrix: Any) -> list[tuple[torch.Tensor, torch.Tensor, Any]]:
    """Return A and B of each slice of the weight, with the rows of a matrix that they stand for."""
    a, b = branch.lora_A.detach(), branch.lora_B.detach()
    pairs, start = [], 0
    for index, rows in enumerate(site.slices):
        place = slice(start, start + rows)
        own = a[index * SPEC.rank : (index + 1) * SPEC.rank]
        pairs.append((own, b[place], None if matrix is None else matrix[place]))
        start += rows
    return pairs or [(a, b, matrix)]

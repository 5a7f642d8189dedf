"""Helpers for the tests of the bank: random adapters, and a model with an adapter folded into its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorasc_fx import Site
from lorasc_fx.branch import Factors

Pairs = dict[str, Factors]


def random_pairs(sites: Iterable[Site], rank: int, seed: int, size: float = 0.2) -> Pairs:
    """Return factors for every site, in the stored layout of its weight. Each changes its weight by about `size`."""
    generator, pairs = torch.Generator().manual_seed(seed), {}
    for site in sites:
        lead = 1 if site.experts else 0
        stack, rows, columns = site.shape[:lead], site.shape[lead], torch.Size(site.shape[lead + 1 :]).numel()
        b = torch.randn(*stack, rows, rank, generator=generator, dtype=torch.float64)
        a = torch.randn(*stack, rank, columns, generator=generator, dtype=torch.float64)
        pairs[site.weight] = Factors(b * size / rank, a * columns**-0.5)
    return pairs


def folded(model: nn.Module, pairs: Mapping[str, Factors]) -> nn.Module:
    """Return the model after writing `W0 + b @ a` into its weights, rounded once."""
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, pair in pairs.items():
            weights[name].copy_(
                (weights[name].double() + (pair.b @ pair.a).view(weights[name].shape)).to(weights[name])
            )
    return model


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def distance(got: Any, expected: Any, row: int | None = None, rows: int = 0) -> float:
    """Return the largest difference, relative to the largest entry, over all outputs.

    With `row`, only this row is compared, of outputs that have `rows` rows on axis 0.
    """
    worst = 0.0
    for one, other in zip(tensors(got), tensors(expected), strict=True):
        assert one.shape == other.shape
        if row is not None and len(other) != rows:
            continue
        difference = (one - other).abs() if row is None else (one[row] - other[row]).abs()
        worst = max(
            worst, (difference.max() / other.abs().max().clamp_min(1e-30)).item() if difference.numel() else 0.0
        )
    return worst

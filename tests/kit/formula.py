"""A branch by plain products, as docs/algorithm.md has it: delta = s B A."""

from __future__ import annotations

from torch import Tensor, cat

import lorasc_fx as lx


def delta(site: lx.Site, a: Tensor, b: Tensor) -> Tensor:
    """Return s B A in the weight's shape and layout; of each expert, of a packed weight slice by slice.

    The scale is computed from the plan's rank and alpha, not read from the branch.
    """
    pairs = zip(b.split(site.slices), a.split(site.rank), strict=True) if site.slices else [(b, a)]
    product = cat([rows @ own for rows, own in pairs]) * (
        site.options.lora_alpha / site.rank ** (0.5 if site.options.use_rslora else 1)
    )
    return (product if site.layout == "out_in" else product.mT).reshape(site.shape)

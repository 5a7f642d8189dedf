"""Whether peft's adapter of a module computes what the delta of its weight does: tried in fp64 on a call of the module.

peft's layers are written for torch's own classes. A module of another forward, a convolution with a dilation or another
padding mode, an embedding that does more than look up: there the adapter is another function than the merged weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from lorasc_fx.branch import dense
from lorasc_fx.capture import copied, quiet, substituted
from lorasc_fx.export.callers import Call
from lorasc_fx.export.peft_layout import Conv, Place
from lorasc_fx.state import Factors
from lorasc_fx.undo import raise_of_handler

__all__ = ["fault_of"]


def fault_of(place: Place, module: nn.Module, call: Call) -> str | None:
    """Return what is wrong with peft's adapter at this place, as words for people, or None.

    Args:
        place: whose layout is peft's for a module by its name.
        module: at that place.
        call: arguments that the module was called with.
    """
    values = {name: dense(value.detach()).double() for name, value in module.named_parameters()}
    weight = values[place.leaf]
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    source = torch.Generator().manual_seed(0)
    b, a = (torch.randn(shape, generator=source, dtype=torch.float64) for shape in ((rows, 2), (2, columns)))
    pair = Factors(b.to(weight.device), a.to(weight.device))
    delta = (pair.b @ pair.a).view(weight.shape)
    try:
        with quiet(), torch.no_grad():
            base = _run(module, values, call)
            full = _run(module, values | {place.leaf: weight + delta}, call)
            adapted = base + _term(place, module, pair, weight, _wide(call).args[0])
            moved, gap = (float((full - each).abs().max()) for each in (base, adapted))
    except Exception as fault:  # whatever the module's own code raises, peft's adapter of it would be no better off
        raise_of_handler(fault)
        return f"peft's adapter of {type(module).__name__} cannot be tried: {type(fault).__name__}: {fault}"
    if gap <= 1e-6 * moved + 1e-12 * float(full.abs().max()):
        return None
    return (
        f"peft's adapter of this {type(module).__name__} computes something else than its weight would "
        f"(off by {gap / moved if moved else math.inf:.2g} of the change)"
    )


def _run(module: nn.Module, values: dict[str, torch.Tensor], call: Call) -> torch.Tensor:
    given = _wide(call)
    with substituted(module, values):
        output = module(*given.args, **given.kwargs)
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"it returns {type(output).__name__}, not a tensor")
    return output


def _wide(call: Call) -> Call:
    """Return copies of a call's arguments, floating ones in fp64."""

    def widen(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return Call(*pytree.tree_map(widen, copied(call.args, call.kwargs)))


def _term(place: Place, module: nn.Module, pair: Factors, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return what peft's layer adds to the module's output, built as peft builds it."""
    lora_a, lora_b = place.layout.to_peft(pair, weight.shape)
    if isinstance(module, nn.Embedding):
        looked_up = F.embedding(
            x,
            lora_a.t(),
            module.padding_idx,
            module.max_norm,
            module.norm_type,
            module.scale_grad_by_freq,
            module.sparse,
        )
        scale = getattr(module, "embed_scale", None)
        return looked_up @ lora_b.t() * (1.0 if scale is None else scale)
    if isinstance(place.layout, Conv):
        kind: Any = type(module)
        out, rank, *ones = lora_b.shape
        down = kind(weight.shape[1], rank, module.kernel_size, module.stride, module.padding, bias=False)
        up = kind(rank, out, tuple(ones), tuple(ones), bias=False)
        with substituted(down, {"weight": lora_a}), substituted(up, {"weight": lora_b}):
            found: torch.Tensor = up(down(x))
            return found
    return F.linear(F.linear(x, lora_a), lora_b)
